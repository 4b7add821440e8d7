"""Values of every token that need its logits, without the logits of a whole batch: what all objectives stand on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vstar_jax.models.text import TextModel
from vstar_jax.sharding import map_over_rows


def per_token(
    text: TextModel, hidden: jax.Array, targets: jax.Array, function: Callable[[jax.Array, jax.Array], Any], chunk: int
) -> Any:
    """`function(logits, targets)` at every place of a batch: a tree of arrays [B, S].

    hidden [B, S, D]; targets int32 [B, S]; function: float32 [B, c, V] and int32 [B, c] -> tree of [B, c].
    The logits exist for `chunk` tokens of each row at a time and are computed again in the backward pass, so that memory
    does not grow with S x V.
    """
    length = targets.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]

    graphdef, head, *rest = nnx.split(text, _is_head, ...)

    def values(head: Any, rows: tuple[jax.Array, jax.Array]) -> Any:
        whole = nnx.merge(graphdef, head, *rest)

        @jax.checkpoint
        def one_chunk(slices: tuple[jax.Array, jax.Array]) -> Any:
            hidden, targets = slices
            return function(whole.logits(hidden), targets)

        return jax.tree.map(join, jax.lax.map(one_chunk, jax.tree.map(split, rows)))

    return map_over_rows(values, head, (hidden, targets))


def _is_head(path: Any, _: Any) -> bool:
    """Whether a parameter is of those that `TextModel.logits` reads."""
    return path[0] in ("embedding", "lm_head")
