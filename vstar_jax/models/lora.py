"""Low-rank adapters on any linear layer, chosen by a pattern over module paths (Hu et al., 2021)."""

import re

import jax.numpy as jnp
from flax import nnx

from vstar_jax.config import LoraConfig
from vstar_jax.errors import UserError
from vstar_jax.models.layers import Linear, LoraParam
from vstar_jax.models.qwen2_5_vl import Qwen25VL


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Path such as text/layers/q_proj -> linear layer (a stack of layers is one entry)."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add(model: Qwen25VL, config: LoraConfig, seed: int) -> None:
    """Adds adapters to every linear layer whose path `config.pattern` matches; UserError when none does or it is no pattern."""
    try:
        pattern = re.compile(config.pattern)
    except re.error as error:
        raise UserError(f"policy.lora.pattern {config.pattern!r} is no regular expression ({error}): correct it.") from error
    found = [module for path, module in linears(model).items() if pattern.search(path)]
    if not found:
        raise UserError(f"policy.lora.pattern {config.pattern!r} matches no layer: the layers are {', '.join(linears(model))}.")
    rngs = nnx.Rngs(params=seed)
    for module in found:
        module.add_lora(config.rank, config.alpha, rngs)


def merge(model: Qwen25VL) -> None:
    """Folds every adapter into its kernel and removes it."""
    for module in linears(model).values():
        if module.lora_a is None or module.lora_b is None:
            continue
        a, b = module.lora_a[...].astype(jnp.float32), module.lora_b[...].astype(jnp.float32)
        if module.stack is None:
            update = jnp.tensordot(a, b, 1)
        else:
            update = jnp.einsum("l...r,lro->l...o", a, b.reshape(*b.shape[:2], -1)).reshape(module.kernel.get_value().shape)
        kernel = module.kernel[...]
        module.kernel.set_value((kernel.astype(jnp.float32) + module.lora_scale * update).astype(kernel.dtype))
        module.lora_a = module.lora_b = nnx.data(None)


def without(model: Qwen25VL) -> Qwen25VL:
    """The same model with its adapters off, sharing every other array: GRPO's reference when only adapters are trained.

    It is the model before training only if the adapters are as `add` makes them when training starts: merge older ones first.
    """
    base = nnx.merge(*nnx.split(model))
    for module in linears(base).values():
        module.lora_a = module.lora_b = nnx.data(None)
    return base


def trainable(config: LoraConfig) -> type[nnx.Param]:
    """The kind of parameter that training updates."""
    return LoraParam if config.rank else nnx.Param
