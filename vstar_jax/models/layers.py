"""Linear, embedding and RMSNorm with logical axes: the building blocks of both halves of the model.

Every parameter names its logical axes in its `axes` metadata (see `sharding.RULES`). A block whose layers are scanned
passes `stack=L`: its parameters lead with L, and inside the scan the same code sees one layer's slice.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

INITIALIZER_RANGE = 0.02
"""Standard deviation of fresh weights, HF's initializer_range."""


class LoraParam(nnx.Param):
    """A low-rank adapter's matrix: what is trained when LoRA is on."""


def parameter(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: jnp.dtype,
    std: float | None,
    stack: int | None = None,
    kind: type[nnx.Param] = nnx.Param,
    fill: float = 0.0,
) -> nnx.Param:
    """A parameter drawn with standard deviation `std`, or filled when std is None; led by a layer axis when stacked."""
    if stack is not None:
        shape, axes = (stack, *shape), (None, *axes)
    if std is None:
        return kind(jnp.full(shape, fill, dtype), axes=tuple(axes))
    return kind((jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype), axes=tuple(axes))


class Linear(nnx.Module):
    """y = x W + b over the last len(inputs) axes of x; inputs and outputs are shapes, so heads keep an axis of their own."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Sequence[str | None],
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        stack: int | None = None,
        std: float = INITIALIZER_RANGE,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs, self.axes, self.dtype, self.stack = tuple(inputs), tuple(outputs), tuple(axes), dtype, stack
        self.kernel = parameter(rngs, (*inputs, *outputs), axes, param_dtype, std, stack)
        self.bias = parameter(rngs, outputs, axes[len(inputs) :], param_dtype, None, stack) if bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def add_lora(self, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        """Adds a low-rank path that starts at zero (Hu et al., 2021), in float32: it is small, and it is what is trained."""
        split, dtype = len(self.inputs), jnp.dtype(jnp.float32)
        std = 1 / math.sqrt(math.prod(self.inputs))
        self.lora_a = parameter(rngs, (*self.inputs, rank), (*self.axes[:split], None), dtype, std, self.stack, LoraParam)
        self.lora_b = parameter(rngs, (rank, *self.outputs), (None, *self.axes[split:]), dtype, None, self.stack, LoraParam)
        self.lora_scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        # One axis of rows makes the kernel's gradient a product of two matrices; with more of them XLA on CPU first writes a
        # transposed copy, computing what it is made of (the gradient of SwiGLU) in strides that miss the cache.
        shape = x.shape[: x.ndim - len(self.inputs)]
        x = x.reshape(-1, *self.inputs)
        y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), len(self.inputs))
        if self.bias is not None:
            y += self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = jnp.tensordot(x, self.lora_a[...].astype(self.dtype), len(self.inputs))
            y += self.lora_scale * jnp.tensordot(low, self.lora_b[...].astype(self.dtype), 1)
        return y.reshape(*shape, *self.outputs)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (HF Qwen2RMSNorm)."""

    def __init__(self, width: int, eps: float, *, param_dtype: jnp.dtype, stack: int | None = None, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = parameter(rngs, (width,), (None,), param_dtype, None, stack, fill=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h *= jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * h.astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) with the middle width split over `model`; options as of `Linear`."""

    def __init__(self, width: int, middle: int, **options: Any):
        self.gate_proj = Linear((width,), (middle,), ("embed", "mlp"), **options)
        self.up_proj = Linear((width,), (middle,), ("embed", "mlp"), **options)
        self.down_proj = Linear((middle,), (width,), ("mlp", "embed"), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def scan_layers(layers: nnx.Module, body, carry, remat: str, *per_layer: jax.Array):
    """Runs `carry = body(layer, carry, *slices)` over stacked layers in one `lax.scan`.

    remat: "none" keeps every intermediate for the backward pass, "dots" keeps matrix products, "full" keeps only the carry.
    per_layer: arrays [L, ...] of which each layer gets its slice. A scan compiles one layer whatever their number.
    """
    graphdef, stacked = nnx.split(layers)

    def step(carry, slices):
        state, *rest = slices
        return body(nnx.merge(graphdef, state), carry, *rest), None

    if remat == "dots":
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)
    elif remat == "full":
        step = jax.checkpoint(step, prevent_cse=False)
    return jax.lax.scan(step, carry, (stacked, *per_layer))[0]
