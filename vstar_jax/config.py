"""One tree of frozen dataclasses is one run; YAML files in configs/ fill it and dotted flags go on top.

The docstrings below are the help of the command line and the config reference of the README.
"""

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["float32", "bfloat16"]


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
        param_dtype: type in which parameters are kept and updated.
        remat: what the backward pass recomputes: nothing, all but matrix products, or whole layers.
        lora: low-rank adapters.
    """

    path: str = "vstar_jax/assets/stick-motion-base"
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Literal["none", "dots", "full"] = "none"
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
        dataset: name of the dataset.
        dir: folder of prepared datasets; StickMotion is rendered there when it is missing.
        difficulty: StickMotion's backgrounds: clean, cluttered, or a mixture.
        clips_per_action: StickMotion's training clips of each base action.
        labels: length of the label list in a prompt.
        tokens: ascending buckets of sequence length.
        patches: ascending buckets of patches a row.
        pack: put several short dialogues into a row.
        prompts: file of prompt texts.
        threads: threads that read and draw clips.
    """

    dataset: str = "stick_motion"
    dir: str = "data"
    difficulty: Literal["clean", "mixed", "cluttered"] = "mixed"
    clips_per_action: int = 40
    labels: int = 8
    tokens: tuple[int, ...] = (384, 512)
    patches: tuple[int, ...] = (256, 512)
    pack: bool = False
    prompts: str = "configs/prompts/stick_motion.yaml"
    threads: int = 2


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (Eq. 2).

    Args:
        steps: optimizer steps; 0 skips SFT.
        batch_size: rows a step, over all devices.
        accumulate: micro-batches that a step is split into.
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: AdamW weight decay.
        max_grad_norm: gradients are clipped to this global norm.
        chunk: tokens whose logits exist at a time.
        target: train on the assistant's tokens, or on all text as the released code does.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
    """

    steps: int = 150
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    chunk: int = 128
    target: Literal["assistant", "all"] = "assistant"
    save_every: int = 50
    keep: int = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    Args:
        batch_size: episodes at a time, over all devices.
        clips_per_action: held-out clips of each action that are evaluated; 0 takes all.
        max_new_tokens: most tokens a reply may have.
        temperature: 0 decodes greedily.
    """

    batch_size: int = 32
    clips_per_action: int = 2
    max_new_tokens: int = 160
    temperature: float = 0.0


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        seed: everything random in a run follows from it.
        run_dir: where the run writes; a run that was interrupted resumes there.
        mesh: devices as DATAxMODEL: batch and parameters are split over DATA, heads and widths over MODEL.
        policy: the model.
        video: frames and patches.
        data: datasets and shapes.
        sft: supervised fine-tuning.
        evaluation: held-out evaluation.
    """

    seed: int = 0
    run_dir: str = "runs/default"
    mesh: str = "1x1"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
