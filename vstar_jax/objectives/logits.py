"""Values of tokens that need their logits, without the logits of a whole batch: what all objectives stand on.

Of a dialogue only what the assistant says is learned, often a third of its tokens. A vocabulary is wide, so that computing
logits and their sums for learned tokens alone is worth a loop whose length depends on how many they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vstar_jax.models.text import TextModel
from vstar_jax.sharding import map_over_rows, rows_by_device


def per_token(
    text: TextModel,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    function: Callable[[jax.Array, jax.Array], Any],
    chunk: int,
) -> Any:
    """`function(logits, targets)` at the places of a batch where `mask` is true, and zeros elsewhere: a tree of arrays [B, S].

    hidden [B, S, D]; targets int32 [B, S]; mask bool [B, S]; function: float32 [n, V] and int32 [n] -> tree of float32 [n].
    The logits exist for `chunk` places a row at a time and are computed again in the backward pass, so that memory does not
    grow with S x V. Gradients of the vocabulary are summed in float32.
    """
    graphdef, head, *rest = nnx.split(text, _is_head, ...)
    unread = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    most = rows_by_device(mask).sum((1, 2)).max()  # of any device: where all take as many turns, none waits in another loop

    def apply(head: Any, hidden: jax.Array, targets: jax.Array) -> Any:
        return function(nnx.merge(graphdef, head, *unread).logits(hidden), targets)

    def values(head: Any, rows: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        hidden, targets, mask = rows
        size = min(chunk, targets.shape[1]) * len(targets)
        wanted = jnp.flatnonzero(mask, size=-(-mask.size // size) * size, fill_value=mask.size)
        flat = (hidden.reshape(mask.size, -1), targets.reshape(-1), wanted.astype(jnp.int32), -(-most // size))
        return jax.tree.map(lambda x: x.reshape(mask.shape), _in_chunks(apply, size, head, *flat))

    return map_over_rows(values, head, (hidden, targets, mask))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    apply: Callable, size: int, head: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array, count: jax.Array
) -> Any:
    """`apply(head, hidden, targets)` at the places int32 [m] that are wanted of N, in `count` chunks of `size`: a tree of [N].

    hidden [N, D]; targets int32 [N]; a place N is none.
    """

    def one(number: jax.Array, out: Any) -> Any:
        places = _chunk(wanted, number, size)
        found = apply(head, hidden[places], targets[places])
        return jax.tree.map(lambda whole, part: whole.at[places].set(part, mode="drop"), out, found)

    shapes = jax.eval_shape(apply, head, hidden[:size], targets[:size])
    start = jax.tree.map(lambda x: jnp.zeros_like(hidden[:, 0], x.dtype), shapes)
    return _repeated(one, count, len(wanted) // size, start)


def _repeated(one: Callable, count: jax.Array, most: int, start: Any) -> Any:
    """`fori_loop` over `count` turns, of which the program itself says that there are at most so many."""

    def more(carry: tuple[jax.Array, Any]) -> jax.Array:
        return (carry[0] < most) & (carry[0] < count)

    return jax.lax.while_loop(more, lambda carry: (carry[0] + 1, one(*carry)), (jnp.int32(0), start))[1]


def _chunk(wanted: jax.Array, number: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(wanted, number * size, size)


def _forward(apply: Callable, size: int, *given: Any) -> tuple[Any, Any]:
    return _in_chunks(apply, size, *given), given


def _backward(apply: Callable, size: int, given: Any, cotangents: Any) -> tuple[Any, ...]:
    head, hidden, targets, wanted, count = given

    def one(number: jax.Array, total: Any) -> Any:
        by_head, by_hidden = total
        places = _chunk(wanted, number, size)
        _, pull = jax.vjp(lambda head, hidden: apply(head, hidden, targets[places]), head, hidden[places])
        of_head, of_hidden = pull(jax.tree.map(lambda x: x.at[places].get(mode="fill", fill_value=0), cotangents))
        by_head = jax.tree.map(jnp.add, by_head, of_head)
        return by_head, by_hidden.at[places].set(of_hidden, mode="drop")

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), head), jnp.zeros_like(hidden)
    by_head, by_hidden = _repeated(one, count, len(wanted) // size, start)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), by_head, head), by_hidden, None, None, None


_in_chunks.defvjp(_forward, _backward)


def _is_head(path: Any, _: Any) -> bool:
    """Whether a parameter is of those that `TextModel.logits` reads."""
    return path[0] in ("embedding", "lm_head")
