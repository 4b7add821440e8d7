"""The programs of a run as abstract ones: the real functions of training and rollout with shapes in the place of arrays.

Nothing is drawn, loaded or computed, so that a program for hundreds of chips is built on a laptop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vstar_jax import sharding
from vstar_jax.batch import MERGE, PATCH_VALUES, Batch, Example, Turn, bucket, collate
from vstar_jax.config import Config, DataConfig, GrpoConfig, PolicyConfig, RolloutConfig, SftConfig, VideoConfig
from vstar_jax.data.patches import PATCH, TEMPORAL_PATCH, Grid, window_order
from vstar_jax.data.processor import smart_resize
from vstar_jax.errors import UserError
from vstar_jax.models import lora
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, check_mesh, create
from vstar_jax.rollout.episode import Rollout
from vstar_jax.rollout.weights import rollout_weights
from vstar_jax.training.collect import sampling_of
from vstar_jax.training.grpo import Experience, make_grpo_optimizer, make_grpo_step, make_reference
from vstar_jax.training.state import TrainState, abstract_state, make_optimizer, make_train_step

MODELS = {"tiny": "tiny", "qwen2.5-vl-3b": "3b", "qwen2.5-vl-7b": "7b"}
"""Names that a user may give -> presets of `Architecture`."""
WHATS = ("sft", "rollout", "grpo")
CLIP = (480, 640)
"""Height and width in pixels of a clip before it is resized."""
PROMPT_TEXT = 48
"""Tokens that the first turn has beside its clip at least, which choose its bucket."""
STOP_IDS = 2


def paper(model: str) -> Config:
    """The paper's settings for a model of `MODELS`: 16 frames of at most 128 * 28 * 28 pixels, eight dialogues a step, and four
    episodes for each of eight prompts with up to 4,096 tokens in the last reply.
    """
    if model not in MODELS:
        raise UserError(f"there is no model {model!r}: choose one of {', '.join(MODELS)}.")
    if model == "tiny":
        return Config(sft=SftConfig(batch_size=8), grpo=GrpoConfig(prompts=8, group=4, accumulate=4))
    return Config(
        policy=PolicyConfig(path="", dtype="bfloat16", remat="full"),
        video=VideoConfig(frames=16, max_pixels=128 * 28 * 28),
        data=DataConfig(tokens=(2048, 6144), patches=(4096, 8192)),
        sft=SftConfig(batch_size=8),
        grpo=GrpoConfig(prompts=8, group=4, accumulate=4),
        rollout=RolloutConfig(max_new_tokens=(512, 4096), turn_tokens=4096),
    )


@dataclass(frozen=True)
class Program:
    """A jitted function with shapes for its arguments.

    function, arguments: what is compiled; parts: name -> those among the arguments; resident: name -> what else lies on the
    devices while it runs; cache: the KV cache at its largest; gradient: that of all that is trained; loops: how often a loop
    runs whose length the program is given.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    parts: Mapping[str, Any]
    resident: Mapping[str, Any]
    cache: Any = None
    gradient: Any = None
    loops: int = 1


def architecture_of(model: str) -> Architecture:
    """The true architecture of a model of `MODELS`."""
    return Architecture.preset(MODELS[model])


def abstract_policy(architecture: Architecture, config: Config) -> Qwen25VL:
    """The policy of a run, with its adapters if it has any, with shapes in the place of arrays."""

    def build() -> Qwen25VL:
        model = create(architecture, config.policy, seed=0)
        if config.policy.lora.rank:
            lora.add(model, config.policy.lora, seed=0)
        return model

    return nnx.eval_shape(build)


def programs(config: Config, architecture: Architecture, mesh: Mesh, what: str) -> list[Program]:
    """The programs of `what`: sft, rollout or grpo (the reference's log-probabilities and the update)."""
    check_mesh(architecture, mesh)
    build: dict[str, Callable[..., list[Program]]] = {"sft": _sft, "rollout": _rollout, "grpo": _grpo}
    return build[what](config, abstract_policy(architecture, config), mesh)


def clip_grid(config: VideoConfig) -> Grid:
    """The grid of a clip of `CLIP` with all the frames that it may have."""
    height, width = smart_resize(*CLIP, config.min_pixels, config.max_pixels)
    return config.frames // TEMPORAL_PATCH, height // PATCH, width // PATCH


def rows(config: Config, count: int, clips: int, tokens: int, patches: int, mesh: Mesh) -> Batch:
    """A batch of `count` rows with `clips` clips each and room for `tokens` and `patches`, as shapes split over data."""
    layout = window_order(clip_grid(config.video))
    length = len(layout.order)
    piece = Example(
        tokens=np.zeros(1, np.int32),
        positions=np.zeros((1, 3), np.int32),
        loss_mask=np.zeros(1, bool),
        visual_index=np.full(1, -1, np.int32),
        patches=np.zeros((length, PATCH_VALUES), np.uint8),
        patch_hw=layout.patch_hw,
        window_id=layout.window_id,
        frame_id=layout.frame_id,
    )
    one = collate([[piece] * clips], (tokens,), (patches,))
    return jax.tree.map(lambda x: _split(mesh, x.dtype, count, *x.shape[1:]), one)


def _split(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    sharding.local_rows(mesh, shape[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _visual(config: Config) -> tuple[int, int]:
    """Patches of a clip, and the tokens that they become."""
    patches = int(np.prod(clip_grid(config.video)))
    return patches, patches // MERGE


def _sft(config: Config, policy: Qwen25VL, mesh: Mesh) -> list[Program]:
    """The train step on dialogues with two clips that fill the largest bucket."""
    optimizer = make_optimizer(config.sft, config.policy.moment_dtype)
    graphdef, state = abstract_state(policy, optimizer, config.policy.lora, mesh)
    patches, _ = _visual(config)
    at = bucket(2 * patches, config.data.patches, "patches")
    batch = rows(config, config.sft.batch_size, 2, config.data.tokens[-1], at, mesh)
    step = make_train_step(graphdef, optimizer, config.sft, config.data.pack, state)
    return [Program("sft", step, (state, batch), {**_parts(state), "batch": batch}, {}, gradient=state.params)]


def _parts(state: TrainState) -> dict[str, Any]:
    return {"parameters": (state.params, state.frozen), "optimizer": state.optimizer}


def _prompt_tokens(config: Config) -> int:
    return bucket(_visual(config)[1] + PROMPT_TEXT, config.data.tokens, "tokens")


def _reference(config: Config, state: TrainState) -> dict[str, Any]:
    """The frozen reference's parameters, where it has its own."""
    return {"reference": state.params} if config.grpo.beta and config.grpo.reference == "frozen" else {}


def _rollout(config: Config, policy: Qwen25VL, mesh: Mesh) -> list[Program]:
    """The jitted rollout with the call of the tools in its middle, on a copy of the weights where it has one."""
    grpo = config.grpo
    graphdef, state = abstract_state(policy, make_grpo_optimizer(config), config.policy.lora, mesh)
    patches, _ = _visual(config)
    batch = rows(config, grpo.prompts, 1, _prompt_tokens(config), bucket(patches, config.data.patches, "patches"), mesh)
    turns, sampling = config.rollout, sampling_of(config)
    rollout = Rollout(
        graphdef, _host, turns.turn_tokens, np.arange(STOP_IDS), sampling, mesh, "callback", turns.history, turns.cache
    )
    trained = nnx.merge_state(state.params, state.frozen)
    weights = rollout_weights(trained, config.policy.dtype, mesh) if turns.weights == "gathered" else trained
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(weights), strict=True)
    parameters = [own for own, copy in pairs if own is not copy]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), grpo.prompts * grpo.group))
    arguments = (
        weights,
        batch,
        _split(mesh, jnp.int32, grpo.prompts),
        _split(mesh, keys.dtype, *keys.shape),
        _split(mesh, jnp.int32, grpo.prompts * grpo.group),
    )
    resident = {"optimizer": state.optimizer, **_reference(config, state)}
    if parameters:
        resident["parameters"] = parameters
    parts = {("weights" if parameters else "parameters"): weights, "batch": arguments[1:]}
    return [Program("rollout", rollout.play, arguments, parts, resident, _cache(config, policy, mesh))]


def _cache(config: Config, policy: Qwen25VL, mesh: Mesh) -> Any:
    """The prompts' keys and values and those of the longest episodes."""
    grpo, turns, sampling, cfg = config.grpo, config.rollout, sampling_of(config), policy.text.cfg
    later = (sampling.turns - 1) * turns.turn_tokens if turns.history == "append" else turns.turn_tokens
    own = later + (sampling.tokens if turns.history == "append" else max(sampling.limits))

    def pair(count: int, slots: int) -> list[jax.ShapeDtypeStruct]:
        shape = (cfg.layers, count, cfg.kv_heads, slots, cfg.head_dim)
        split = sharding.spec((None, "batch", "kv_heads", None, None), shape, mesh)
        dtype = policy.text.dtype if turns.cache == "same" else jnp.dtype(turns.cache)
        return [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))] * 2

    return pair(grpo.prompts, _prompt_tokens(config)), pair(grpo.prompts * grpo.group, own)


def _host(*_: Any) -> Turn:
    """Stands where the tools' host is called; a program that is only compiled never calls it."""
    raise AssertionError("a program that was only compiled has run")


def _grpo(config: Config, policy: Qwen25VL, mesh: Mesh) -> list[Program]:
    """The reference's log-probabilities and the update, on episodes of full length."""
    grpo, turns, sampling = config.grpo, config.rollout, sampling_of(config)
    optimizer = make_grpo_optimizer(config)
    graphdef, state = abstract_state(policy, optimizer, config.policy.lora, mesh)
    clip = bucket(_visual(config)[0], config.data.patches, "patches")
    length = _prompt_tokens(config) + sampling.tokens + (sampling.turns - 1) * turns.turn_tokens
    count = grpo.prompts * grpo.group
    batch = rows(config, count, sampling.turns, length, sampling.turns * clip, mesh)
    log_probs = _split(mesh, jnp.float32, count, length)
    experience = Experience(batch, log_probs, log_probs, _split(mesh, jnp.float32, count))
    used = jax.ShapeDtypeStruct((), jnp.int32)
    reference = _reference(config, state)
    update = make_grpo_step(graphdef, optimizer, config, state)
    arguments, parts = (state, experience, used), {**_parts(state), "batch": experience}
    found = [Program("update", update, arguments, parts, reference, gradient=state.params, loops=grpo.accumulate)]
    if grpo.beta:
        held = (state.params, state.frozen, experience, used)
        parts = {("reference" if reference else "parameters"): (state.params, state.frozen), "batch": experience}
        resident = {"optimizer": state.optimizer, **({"parameters": state.params} if reference else {})}
        found.insert(0, Program("reference", make_reference(graphdef, config), held, parts, resident, loops=grpo.accumulate))
    return found
