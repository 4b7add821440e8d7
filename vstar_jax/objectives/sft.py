"""The SFT objective (paper, Eq. 2): negative log-likelihood of the target tokens, as an exact (sum, count) pair."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from vstar_jax.batch import Batch
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.logits import per_token


@partial(jax.tree_util.register_dataclass, data_fields=["loss", "correct", "count"], meta_fields=[])
@dataclass(frozen=True)
class Totals:
    """Sums over target tokens, float32 scalars: divide by `count` once, after micro-batches and devices are summed."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


def sft_loss(model: Qwen25VL, batch: Batch, *, chunk: int, packed: bool) -> Totals:
    """Summed next-token loss over the tokens in `batch.loss_mask`; logits exist for `chunk` tokens of each row at a time.

    A dialogue's first token is never a target, so nothing is predicted across a packed boundary.
    """
    targets = jnp.roll(batch.tokens, -1, axis=1)
    mask = jnp.roll(batch.loss_mask, -1, axis=1).at[:, -1].set(False)

    def loss_and_hit(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target, (target == logits.max(axis=-1)).astype(jnp.float32)

    loss, hit = per_token(model.text, model.hidden(batch, packed=packed), targets, mask, loss_and_hit, chunk)
    return Totals(loss.sum(), hit.sum(), mask.sum(dtype=jnp.float32))
