"""One tree of frozen dataclasses is one run; YAML files in configs/ fill it and dotted flags go on top.

The docstrings below are the help of the command line and the config reference of the README. How text becomes a tree
stands in `vstar_jax.settings`; which trees make sense stands in `check`.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vstar_jax import settings
from vstar_jax.errors import UserError

DType = Literal["float32", "bfloat16"]
CacheDType = Literal["same", "bfloat16", "float8_e4m3fn"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers whose path matches.

    Args:
        rank: rank of the adapters; 0 trains all parameters.
        alpha: adapters are scaled by alpha / rank.
        pattern: regular expression over paths such as text/layers/q_proj.
    """

    rank: int = 0
    alpha: float = 16.0
    pattern: str = "text/.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a directory in Hugging Face format and how to compute with it.

    Args:
        path: model directory with config.json, safetensors and tokenizer files.
        dtype: type of activations and matrix products.
        param_dtype: type in which parameters are kept and updated; float32 under bfloat16 activations is what is called master
            weights. Adapters are float32 always.
        moment_dtype: type in which the optimizer keeps its moments between steps; it computes in float32.
        remat: what the backward pass recomputes: nothing, all but matrix products, or whole layers.
        lora: low-rank adapters.
    """

    path: str = "vstar_jax/assets/stick-motion-base"
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    moment_dtype: DType = "float32"
    remat: Literal["none", "dots", "full"] = "dots"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class VideoConfig:
    """How a clip becomes frames and patches.

    Args:
        frames: most frames taken from a clip, rounded down to an even number.
        min_pixels: frames are scaled up to at least this many pixels.
        max_pixels: frames are scaled down to at most this many pixels.
        second_per_grid: seconds that one temporal patch counts in the positions; 0 takes it from the clip's frame rate.
    """

    frames: int = 16
    min_pixels: int = 56 * 56
    max_pixels: int = 56 * 56
    second_per_grid: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on.

    Args:
        dataset: name of the dataset: stick_motion, hmdb51, ucf101, kinetics400, kinetics600 or ssv2.
        dir: folder of prepared datasets; StickMotion is rendered there when it is missing.
        protocol: base and novel classes of the dataset, or all its classes by a policy that was trained on another.
        full: evaluate all clips of the dataset in the place of its three test splits (cross_dataset of hmdb51 and ucf101).
        variant: Kinetics-600's lists of clips: val of its validation split, vifi of all its splits.
        train: prepared lists to learn from, such as train_s1, or hmdb51/train_s1 where they are of another dataset.
        dialogues: JSON Lines file of the dialogues that SFT learns from, for recorded datasets.
        videos: where the dataset's videos are now; empty when they are where they were prepared.
        allow_leakage: measure even if clips or novel classes were trained on; the results then say so.
        difficulty: StickMotion's backgrounds: clean, cluttered, or a mixture.
        clips_per_action: StickMotion's training clips of each base action.
        sub_motions: StickMotion's dialogues decompose the motion and compare candidates by it; else they name and choose.
        faulty: share of StickMotion's training dialogues that have a fault, as a teacher's have.
        assess: leave out StickMotion's training dialogues in which the rules of the data assessment find a fault.
        labels: length of the label list in a prompt of StickMotion; recorded datasets offer all their classes.
        tokens: ascending buckets of sequence length.
        patches: ascending buckets of patches a row.
        pack: put several short dialogues into a row.
        prompts: file of prompt texts.
        threads: threads that read and draw clips.
        dialect: how the policy writes which tools it wants: yes|no tags, or JSON in tool_call tags (Hermes).
    """

    dataset: str = "stick_motion"
    dir: str = "data"
    protocol: Literal["base_to_novel", "cross_dataset"] = "base_to_novel"
    full: bool = False
    variant: Literal["val", "vifi"] = "val"
    train: tuple[str, ...] = ()
    dialogues: str = ""
    videos: str = ""
    allow_leakage: bool = False
    difficulty: Literal["clean", "mixed", "cluttered"] = "mixed"
    clips_per_action: int = 40
    sub_motions: bool = True
    faulty: float = 0.0
    assess: bool = False
    labels: int = 8
    tokens: tuple[int, ...] = (64, 128, 192, 256, 384, 512)
    patches: tuple[int, ...] = (128, 256)
    pack: bool = False
    prompts: str = "configs/prompts/stick_motion.yaml"
    threads: int = 2
    dialect: Literal["tags", "hermes"] = "tags"


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (Eq. 2).

    Args:
        steps: optimizer steps; 0 skips SFT.
        batch_size: rows a step, over all devices.
        accumulate: micro-batches that a step is split into.
        optimizer: adamw, or muon for the kernels of the layers with adamw for the rest (Jordan et al., 2024).
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: decoupled weight decay of matrices.
        max_grad_norm: gradients are clipped to this global norm.
        chunk: tokens whose logits exist at a time.
        target: train on the assistant's tokens, or on all text as the released code does.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
    """

    steps: int = 250
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    chunk: int = 128
    target: Literal["assistant", "all"] = "assistant"
    save_every: int = 50
    keep: int = 2


@dataclass(frozen=True)
class RewardConfig:
    """What an episode is paid (Eq. 6): the parts that are on, tool and sub_motion only when the answer is right.

    Args:
        accuracy: pay 1 for the right answer.
        format: pay 1 for one think part followed by one answer and nothing else.
        tool: pay 1 for at least one tool call that succeeded.
        sub_motion: pay the weights of the observed sub-motions that occur in the reference.
        weights: how weights fall with the rank of a sub-motion: by halves as in the paper, linearly as in the released code,
            or not at all.
        reference: where sub-motions are looked up: the action's explanation, or the policy's own comparison as in the released
            code, by which it can pay itself.
        temporal: bonus for right answers of a group that is about as accurate as one that saw the frames shuffled, or more (0.3
            in the released scripts); 0 turns it off.
        temporal_ratio: the group must be at least so many times as accurate.
        length: bonus for right answers whose last turn has length_min to length_max tokens (0.2 in the released scripts); 0
            turns it off.
        length_min: fewest tokens for the length bonus.
        length_max: most tokens for the length bonus.
    """

    accuracy: bool = True
    format: bool = True
    tool: bool = True
    sub_motion: bool = True
    weights: Literal["exponential", "linear", "uniform"] = "exponential"
    reference: Literal["explanation", "own"] = "explanation"
    temporal: float = 0.0
    temporal_ratio: float = 0.8
    length: float = 0.0
    length_min: int = 320
    length_max: int = 512


@dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimisation (Eq. 3-5).

    Args:
        steps: steps of generating, rewarding and updating; 0 skips GRPO.
        prompts: prompts a step, over all devices.
        group: episodes of each prompt, whose rewards are compared.
        updates: optimizer updates on the episodes of a step.
        accumulate: micro-batches that an update is split into; those that groups without variance leave over cost nothing.
        learning_rate: peak of the cosine schedule.
        warmup: updates of linear warm-up.
        weight_decay: AdamW weight decay.
        max_grad_norm: gradients are clipped to this global norm.
        normalise: divide advantages by the standard deviation of the group's rewards, or only subtract their mean.
        aggregate: each episode weighs the same (sequence, as in the paper), each token does (token), or token losses are
            summed and divided by a constant length (constant, Dr. GRPO).
        clip_low: probability ratios below 1 - clip_low are clipped.
        clip_high: probability ratios above 1 + clip_high are clipped.
        beta: weight of the KL divergence from the reference; 0 needs no reference.
        kl: estimator of the divergence by a token: k1 log-ratio, k2 half its square, k3 the paper's.
        reference: what the policy is held to: a frozen copy of its first parameters, or itself with the adapters off.
        temperature: sampling temperature, also of the log-probabilities in the loss.
        top_p: rollouts sample from the smallest set of tokens whose probability reaches it.
        chunk: tokens whose logits exist at a time.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
    """

    steps: int = 40
    prompts: int = 32
    group: int = 4
    updates: int = 1
    accumulate: int = 8
    learning_rate: float = 2e-4
    warmup: int = 5
    weight_decay: float = 0.01
    max_grad_norm: float = 5.0
    normalise: Literal["std", "none"] = "std"
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl: Literal["k1", "k2", "k3"] = "k3"
    reference: Literal["frozen", "adapters_off"] = "frozen"
    temperature: float = 0.8
    top_p: float = 1.0
    chunk: int = 128
    save_every: int = 10
    keep: int = 2


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are played, in reinforcement learning and in evaluation.

    Args:
        mode: one jitted program that calls the host between the turns, or a return to Python after each turn.
        history: a turn goes on after what was before it, or starts anew with the annotated clip in the place of the raw one, as
            the released checkpoints were trained.
        turns: replies of an episode at most; from the second on it is over with an answer.
        max_new_tokens: most tokens of the replies in their order; the last holds for all later ones.
        turn_tokens: tokens that a later turn's input is padded to.
        deadline: seconds that the tools of a turn may take.
        weights: read a copy of the parameters in policy.dtype that is whole along the mesh's data axis (gathered), or where
            they lie (split), which needs less memory and, on several devices, gathers them for every token.
        cache: type of the keys and values that are kept: that of activations, or a shorter one.
    """

    mode: Literal["callback", "segmented"] = "callback"
    history: Literal["append", "replace"] = "append"
    turns: int = 2
    max_new_tokens: tuple[int, ...] = (48, 128)
    turn_tokens: int = 192
    deadline: float = 10.0
    weights: Literal["gathered", "split"] = "gathered"
    cache: CacheDType = "same"


@dataclass(frozen=True)
class ToolsConfig:
    """Who answers when the policy calls a tool, in reinforcement learning and in evaluation.

    Args:
        source: the tools server, or what the dataset knows of its own clips (StickMotion: everything; the others: texts alone).
        url: address of a tools server that runs already, such as http://127.0.0.1:8765; empty starts one for the run.
        offered: tools that the policy may have; wishes for others are not heard.
        counterfactual: what the policy gets in the place of what the tools return: none nothing else, blank empty clips and
            texts, shuffled frames and explanations in another order, other the results of another clip.
        failures: the run stops at a step of which more than this share of the tool calls failed.
    """

    source: Literal["server", "annotations"] = "server"
    url: str = ""
    offered: tuple[str, ...] = ("pose_estimation", "person_detection", "video_explanation", "noun_explanation")
    counterfactual: Literal["none", "blank", "shuffled", "other"] = "none"
    failures: float = 0.5


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    Args:
        batch_size: episodes at a time, over all devices.
        clips_per_action: held-out clips of each action that are evaluated; 0 takes all.
        temperature: 0 decodes greedily.
    """

    batch_size: int = 32
    clips_per_action: int = 2
    temperature: float = 0.0


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that are one run, each with devices of its own: all are started with the same settings but `process`.

    Args:
        coordinator: HOST:PORT of the first process, or auto where JAX finds out by itself (TPU pods, GKE, Slurm, Open MPI);
            empty for a run of one process.
        processes: how many there are.
        process: which one this is, from 0 on.
        deadline: seconds in which processes must find each other, and after which one that is silent is taken for dead.
    """

    coordinator: str = ""
    processes: int = 1
    process: int = 0
    deadline: float = 100.0


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        seed: everything random in a run follows from it.
        run_dir: where the run writes; a run that was interrupted resumes there.
        mesh: devices as DATAxMODEL: batch and parameters are split over DATA, heads and widths over MODEL; REPLICASxDATAxMODEL
            splits the batch over replicas, too, and repeats the parameters in each.
        profile: trace three steps of each phase into the run directory, for TensorBoard and Perfetto.
        policy: the model.
        video: frames and patches.
        data: datasets and shapes.
        sft: supervised fine-tuning.
        reward: what an episode is paid.
        grpo: reinforcement learning.
        rollout: how its episodes are played.
        tools: who answers when the policy calls a tool.
        evaluation: held-out evaluation.
        distributed: the processes of the run.
    """

    seed: int = 0
    run_dir: str = "runs/default"
    mesh: str = "1x1"
    profile: bool = False
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


HELP = "Settings come from files, --config=FILE.yaml (several allowed, later ones win), and from flags on top of them:"


def parse(argv: Sequence[str], base: Config | None = None, about: str = "") -> Config:
    """The configuration that a command line asks for; --help ends the program with code 0, an error with code 2.

    argv: --config=FILE.yaml (several allowed, later ones win) and dotted flags such as --sft.steps=10, which go on top.
    base: what they change, the defaults when not given. about: opens the help.
    """
    config = base or Config()
    if {"--help", "-h"} & set(argv):
        print(f"{about}\n\n{HELP}\n{settings.describe(config)}".strip())
        sys.exit(0)
    try:
        files, flags = settings.read_flags(config, argv)
        for file in files:
            config = settings.update(config, settings.read_yaml(resolve(file)), str(file))
        config = settings.update(config, flags, "command line")
        check(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return config


def load(path: str | Path) -> Config:
    """The configuration of a YAML file, as `save` writes it into a run directory; raises UserError as `parse` prints it."""
    config = settings.update(Config(), settings.read_yaml(Path(path)), str(path))
    check(config)
    return config


def save(config: Config, path: str | Path) -> None:
    """Writes all settings as YAML; the file is replaced as a whole or not at all."""
    settings.write_yaml(config, Path(path))


FREE = (
    "run_dir",
    "mesh",
    "profile",
    "data.dir",
    "data.threads",
    "data.videos",
    "data.protocol",
    "data.full",
    "data.variant",
    "data.allow_leakage",
    "sft.save_every",
    "sft.keep",
    "grpo.save_every",
    "grpo.keep",
    "tools.url",
    "tools.failures",
    "evaluation.batch_size",
    "distributed.",
)


def start_run(config: Config) -> None:
    """Saves the configuration in its run directory, as config.yaml.

    Raises UserError when the directory already has checkpoints of a run with other settings, for resuming them would give
    a run that no configuration describes; settings that leave the losses as they are may differ (`FREE`).
    """
    run_dir = Path(config.run_dir)
    path = run_dir / "config.yaml"
    if path.exists() and any(any((run_dir / phase / "checkpoints").glob("[0-9]*")) for phase in ("", "grpo")):
        before = {s.key: s.value for s in settings.settings(load(path))}
        for setting in settings.settings(config):
            if not setting.key.startswith(FREE) and setting.value != before[setting.key]:
                raise UserError(
                    f"{run_dir} holds a run with {setting.key}={before[setting.key]}, but now it is {setting.value}: set it "
                    "back to resume that run, or choose another run_dir."
                )
    save(config, path)


def resolve(path: str | Path) -> Path:
    """A path relative to the working directory, or to the project where only that exists (the shipped defaults)."""
    path, shipped = Path(path), Path(__file__).resolve().parents[1] / path
    return shipped if shipped.exists() and not path.exists() else path


POSITIVE = (
    "distributed.processes",
    "distributed.deadline",
    "policy.lora.alpha",
    "video.min_pixels",
    "video.max_pixels",
    "data.clips_per_action",
    "data.threads",
    "sft.batch_size",
    "sft.accumulate",
    "sft.learning_rate",
    "sft.max_grad_norm",
    "sft.chunk",
    "sft.save_every",
    "sft.keep",
    "grpo.prompts",
    "grpo.updates",
    "grpo.accumulate",
    "grpo.learning_rate",
    "grpo.max_grad_norm",
    "grpo.temperature",
    "grpo.top_p",
    "grpo.chunk",
    "grpo.save_every",
    "grpo.keep",
    "rollout.turn_tokens",
    "rollout.deadline",
    "evaluation.batch_size",
)


def check(config: Config) -> None:
    """Raises UserError, with the key, for a configuration that no run can have."""
    values = {s.key: s.value for s in settings.settings(config)}
    for key in POSITIVE:
        if not values[key] > 0:
            raise UserError(f"{key} is {values[key]}, but must be greater than 0.")
    for key, value in values.items():
        if isinstance(value, int | float) and (not math.isfinite(value) or value < 0):
            raise UserError(f"{key} is {value}, but must be a finite number that is not negative.")
    for key in ("data.tokens", "data.patches"):
        buckets = values[key]
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise UserError(f"{key} is {list(buckets)}, but must be positive and ascending, such as [256, 512].")
    if not config.rollout.max_new_tokens or min(config.rollout.max_new_tokens) < 1:
        limits = list(config.rollout.max_new_tokens)
        raise UserError(
            f"rollout.max_new_tokens is {limits}, but must be positive, one number for each reply, such as [48, 128]."
        )
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*x[1-9]\d*", config.mesh):
        raise UserError(
            f"mesh is {config.mesh!r}, but must be DATAxMODEL with two positive numbers, such as 8x1 or 4x2, or "
            "REPLICASxDATAxMODEL with three."
        )
    distributed = config.distributed
    if distributed.process >= distributed.processes:
        raise UserError(
            f"distributed.process is {distributed.process}, but must be below distributed.processes ({distributed.processes}): "
            "the first is 0."
        )
    if distributed.processes > 1 and not distributed.coordinator:
        raise UserError(
            f"distributed.processes is {distributed.processes}, but nobody says where they meet: set distributed.coordinator "
            "to the HOST:PORT of the first one."
        )
    if distributed.coordinator not in ("", "auto") and not re.fullmatch(r"\S+:\d+", distributed.coordinator):
        raise UserError(
            f"distributed.coordinator is {distributed.coordinator!r}, but must be the HOST:PORT of the first process, such as "
            "10.0.0.1:1234, or auto."
        )
    if config.video.min_pixels > config.video.max_pixels:
        raise UserError(
            f"video.min_pixels is {config.video.min_pixels}, but must not exceed video.max_pixels ({config.video.max_pixels})."
        )
    if config.video.frames < 2:
        raise UserError(f"video.frames is {config.video.frames}, but must be at least 2: a temporal patch joins two frames.")
    if config.data.labels < 2:
        raise UserError(f"data.labels is {config.data.labels}, but must be at least 2: one label leaves nothing to recognise.")
    data = config.data
    if data.faulty > 1:
        raise UserError(f"data.faulty is {data.faulty}, but must be a share, at most 1.")
    if (data.faulty or data.assess) and (data.dataset != "stick_motion" or not data.sub_motions or data.labels < 4):
        raise UserError(
            "data.faulty and data.assess are of StickMotion's whole dialogues: set data.dataset=stick_motion, "
            "data.sub_motions=true and data.labels to at least 4, or leave both out."
        )
    if config.sft.batch_size % config.sft.accumulate:
        raise UserError(f"sft.accumulate is {config.sft.accumulate}, but must divide sft.batch_size ({config.sft.batch_size}).")
    if unknown := [name for name in config.tools.offered if name not in ToolsConfig().offered]:
        raise UserError(f"tools.offered names {unknown[0]}, but the tools are {', '.join(ToolsConfig().offered)}.")
    if config.tools.url and config.tools.source == "annotations":
        raise UserError(f"tools.url is {config.tools.url}, but tools.source is annotations: set tools.source=server to ask it.")
    if config.rollout.turns < 2:
        raise UserError(f"rollout.turns is {config.rollout.turns}, but must be at least 2: the labels come with the second.")
    if config.rollout.history == "replace" and config.sft.steps:
        raise UserError(
            "rollout.history is replace, but SFT learns dialogues as a whole: set sft.steps=0, or rollout.history=append."
        )
    _check_grpo(config)


def _check_grpo(config: Config) -> None:
    grpo, reward = config.grpo, config.reward
    if grpo.group < 2:
        raise UserError(f"grpo.group is {grpo.group}, but must be at least 2: rewards are compared inside a group.")
    if grpo.prompts * grpo.group % grpo.accumulate:
        raise UserError(
            f"grpo.accumulate is {grpo.accumulate}, but must divide the episodes of a step "
            f"(grpo.prompts x grpo.group = {grpo.prompts * grpo.group})."
        )
    if grpo.clip_low > 1:
        raise UserError(f"grpo.clip_low is {grpo.clip_low}, but must be at most 1: a ratio is never below 0.")
    if grpo.top_p > 1:
        raise UserError(f"grpo.top_p is {grpo.top_p}, but must be at most 1.")
    if grpo.reference == "adapters_off" and not config.policy.lora.rank:
        raise UserError(
            "grpo.reference is adapters_off, but the policy has no adapters: set policy.lora.rank, or grpo.reference=frozen."
        )
    if reward.length_min > reward.length_max:
        raise UserError(
            f"reward.length_min is {reward.length_min}, but must not exceed reward.length_max ({reward.length_max})."
        )
