"""The SFT objective (paper, Eq. 2): negative log-likelihood of the target tokens, as an exact (sum, count) pair."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from vstar_jax.batch import Batch
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.sharding import sum_over_data


@partial(jax.tree_util.register_dataclass, data_fields=["loss", "correct", "count"], meta_fields=[])
@dataclass(frozen=True)
class Totals:
    """Sums over target tokens, float32 scalars: divide by `count` once, after micro-batches and devices are summed."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


def sft_loss(model: Qwen25VL, batch: Batch, *, chunk: int, packed: bool) -> Totals:
    """Summed next-token loss over the tokens in `batch.loss_mask`.

    The logits exist for `chunk` tokens of each row at a time and are computed again in the backward pass, so that memory
    does not grow with S x V. A dialogue's first token is never a target, so nothing is predicted across a packed boundary.
    """
    hidden = model.hidden(batch, packed=packed)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    mask = jnp.roll(batch.loss_mask, -1, axis=1).at[:, -1].set(False)
    chunk = min(chunk, hidden.shape[1])
    padding = -hidden.shape[1] % chunk

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    graphdef, weights = nnx.split(model.text)

    def totals(weights, rows) -> Totals:
        text = nnx.merge(graphdef, weights)

        @jax.checkpoint
        def one_chunk(slices) -> Totals:
            hidden, targets, mask = slices
            logits = text.logits(hidden)
            target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            loss = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - target, 0.0)
            correct = mask & (target == logits.max(axis=-1))
            return Totals(loss.sum(), correct.sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32))

        return jax.tree.map(jnp.sum, jax.lax.map(one_chunk, jax.tree.map(chunks, rows)))

    return sum_over_data(totals, weights, (hidden, targets, mask))
