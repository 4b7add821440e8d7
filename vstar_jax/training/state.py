"""What a training run carries from step to step, and the jitted step that updates it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import sharding
from vstar_jax.batch import Batch
from vstar_jax.config import DType, LoraConfig, SftConfig
from vstar_jax.models.lora import trainable
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.sft import Totals, sft_loss

ADAM_B2 = 0.98  # short runs: the default of 0.999 would not settle within them


@partial(jax.tree_util.register_dataclass, data_fields=["step", "key", "params", "frozen", "optimizer"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """step int32 []; key, from which a step's randomness is folded by its number; params, the NNX state that is trained;
    frozen, the rest of the model; optimizer, optax's state.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    frozen: Any
    optimizer: Any


def make_optimizer(config: SftConfig, moment_dtype: DType = "float32") -> optax.GradientTransformation:
    """AdamW or Muon under a linear warm-up and a cosine to zero, after clipping by the global norm.

    moment_dtype: type in which moments are kept from step to step.
    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both (Liu et al., 2025, section 2.2).
    """
    cosine = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, max(config.steps, config.warmup + 1))

    def schedule(count: jax.Array) -> jax.Array:
        return cosine(count + 1)  # the first step learns something, the last one comes to rest

    if config.optimizer == "muon":
        update = optax.contrib.muon(
            schedule,
            adam_b2=ADAM_B2,
            weight_decay=config.weight_decay,
            weight_decay_mask=_decayed,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=partial(jax.tree.map_with_path, _as_matrix),
        )
    else:
        update = optax.adamw(schedule, b2=ADAM_B2, weight_decay=config.weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), _kept_in(moment_dtype, update))


def _kept_in(dtype: DType, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, computing in float32, with its state in `dtype` between steps."""

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(cast(grads, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decayed(params: Any) -> Any:
    """Weight decay is for matrices: norms and biases are left out."""
    return jax.tree.map_with_path(lambda path, _: path[-2].key not in ("bias", "weight"), params)


def _as_matrix(path: Any, value: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a layer's kernel are inputs and which outputs, after the axis of layers; None is for AdamW."""
    if path[-2].key != "kernel" or value.ndim < 3:
        return None
    split = 3 if path[-3].key in ("o_proj", "proj") else 2  # these two sum over heads and their channels
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, value.ndim)))


def create_state(
    model: Qwen25VL, optimizer: optax.GradientTransformation, lora: LoraConfig, mesh: Mesh, seed: int
) -> tuple[Any, TrainState]:
    """Splits the model in what is trained and what is not, and starts the optimizer in the parameters' own sharding.

    Returns the graph definition, with which `nnx.merge(graphdef, params, frozen)` is the model again, and the state.
    """
    graphdef, *states = nnx.split(model, trainable(lora), ...)
    # Fresh adapters lie on one device until here; loaded weights are in their place already.
    params, frozen = (sharding.put(s, sharding.state_shardings(s, mesh)) for s in states)
    opt_state = jax.jit(optimizer.init, out_shardings=_optimizer_layout(optimizer, params, mesh)[1])(params)
    step, key = jax.jit(lambda: (jnp.int32(0), jax.random.key(seed)), out_shardings=sharding.replicated(mesh))()
    return graphdef, TrainState(step, key, params, frozen, opt_state)


def abstract_state(
    model: Qwen25VL, optimizer: optax.GradientTransformation, lora: LoraConfig, mesh: Mesh
) -> tuple[Any, TrainState]:
    """`create_state` of a model of shapes: the same, with shapes and shardings in the place of arrays."""
    graphdef, *states = nnx.split(model, trainable(lora), ...)

    def shaped(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    params, frozen = (shaped(s, sharding.state_shardings(s, mesh)) for s in states)
    opt_state = shaped(*_optimizer_layout(optimizer, params, mesh))
    first = jax.eval_shape(lambda: (jnp.int32(0), jax.random.key(0)))
    step, key = shaped(first, (sharding.replicated(mesh),) * 2)
    return graphdef, TrainState(step, key, params, frozen, opt_state)


def _optimizer_layout(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The shapes of the optimizer's state, and its sharding: the parameters' own."""
    shapes = jax.eval_shape(optimizer.init, params)
    return shapes, optax.tree_utils.tree_map_params(
        optimizer,
        lambda x, s: x if isinstance(x, optax.MaskedNode) else s,
        shapes,
        sharding.state_shardings(params, mesh),
        transform_non_params=lambda _: sharding.replicated(mesh),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # what one part of the optimizer leaves to another
    )


def zeros_like_float32(tree: Any) -> Any:
    """What a sum of gradients over micro-batches starts from: in bfloat16 it would lose the later ones."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tree)


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, config: SftConfig, packed: bool, state: TrainState
) -> Callable:
    """The jitted step (state, batch) -> (state, metrics); the state's buffers are donated.

    The new state keeps the shardings of `state`: were they left to the compiler, the second step would compile again.

    `accumulate` micro-batches are summed by a scan as (sum, count), so that the step does not depend on how it is split.
    """

    def loss(params, frozen, batch: Batch):
        totals = sft_loss(nnx.merge(graphdef, params, frozen), batch, chunk=config.chunk, packed=packed)
        return totals.loss, totals

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every micro-batch lies over all devices.
        parts = x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    def train_step(state: TrainState, batch: Batch):
        def micro(total, part: Batch):
            (_, totals), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, part)
            return jax.tree.map(jnp.add, total, (totals, grads)), None

        zero = jnp.zeros((), jnp.float32)
        start = (Totals(zero, zero, zero), zeros_like_float32(state.params))
        if config.accumulate == 1:
            (totals, grads), _ = micro(start, batch)
        else:
            (totals, grads), _ = jax.lax.scan(micro, start, jax.tree.map(split, batch))
        count = jnp.maximum(totals.count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "sft/loss": totals.loss / count,
            "sft/token_accuracy": totals.correct / count,
            "sft/target_tokens": totals.count,
            "sft/grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, state.key, params, state.frozen, opt_state), metrics

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
