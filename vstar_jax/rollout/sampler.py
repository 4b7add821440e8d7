"""Prefill and decoding: one while_loop a turn, each row at its own cursor, for evaluation and rollouts.

Randomness belongs to the row: a key for each row, folded with the place of the token in its turn, so that what a row
samples does not change with its batch or its mesh.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from vstar_jax import sharding
from vstar_jax.batch import Batch
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.models.text import KVCache

BLOCK = 64
"""Weights that `draw` sums at a time."""
SHORTEST, STAGES = 1024, 3
"""Fewest slots, and most sizes, of the part of a cache that `decode` reads: see `stages`."""
BELOW = 1 - 2.0**-22
"""Keeps a point under the sum of the weights, so that no index of weight 0 is drawn."""


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "log_probs"], meta_fields=[])
@dataclass(frozen=True)
class Completion:
    """What a turn sampled: tokens int32 [B, M], lengths int32 [B] with the stop token counted, log_probs float32 [B, M].

    log_probs are the policy's own at the sampling temperature (at temperature 1 when decoding greedily), before top-p.
    Places after a row's length hold zeros.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array


def prefill(model: Qwen25VL, batch: Batch, cache: KVCache, visual: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
    """Appends a batch of prompts (or of next turns) and returns the logits float32 [B, V] after each row's last token.

    visual: the batch's pictures [B, P / 4, D] where they are encoded already.
    """
    added = (batch.segments > 0).sum(axis=1)
    if visual is None:
        hidden, cache = model.extend(batch, cache)
    else:
        embedded = model.embed(batch.tokens, batch.visual_index, visual)
        hidden, cache = model.text.extend(embedded, model.text.angles(batch.positions), added, cache)
    return model.logits(jnp.take_along_axis(hidden, (added - 1)[:, None, None], axis=1)[:, 0]), cache


def decode(
    model: Qwen25VL,
    logits: jax.Array,
    positions: jax.Array,
    cache: KVCache,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    limit: int,
    temperature: float,
    top_p: float = 1.0,
    active: jax.Array | None = None,
) -> tuple[Completion, KVCache]:
    """Samples until every row has stopped or has `limit` tokens.

    A long cache is read in stages: what is empty at its end costs nothing until some row that still writes comes near it.

    Args:
        model: the policy.
        logits: float32 [B, V] after the prompt.
        positions: int32 [B], the position of the first new token.
        cache: filled up to the prompt; the new tokens, stop token included, are appended to it.
        keys: PRNG keys [B].
        stop_ids: int32 [n]; a row ends with the first of them, which stays in the completion.
        limit: most new tokens M.
        temperature: 0 takes the most likely token.
        top_p: samples from the smallest set of tokens whose probability reaches it.
        active: bool [B], the rows that write at all; all when not given.
    """
    rows, row_ids = logits.shape[0], jnp.arange(logits.shape[0])
    # A scan would copy every layer's cache and weights out of their stacks for each token, but on TPU: they are taken out once.
    unrolled = sharding.platform() != "tpu"
    layers, cache = (model.text.each_layer(), cache.by_layer()) if unrolled else (None, cache)

    # All at once: one number at a time, drawing it costs a token as much as a layer.
    points = jax.vmap(lambda at: uniform(jax.vmap(jax.random.fold_in, (0, None))(keys, at)))(jnp.arange(limit))

    def step(carry):
        at, done, logits, positions, angles, cache, completion = carry
        token, log_prob = sample(logits, points[at], temperature, top_p)
        token, log_prob = jnp.where(done, 0, token), jnp.where(done, 0.0, log_prob)
        completion = Completion(
            completion.tokens.at[row_ids, at].set(token),
            completion.lengths + ~done,
            completion.log_probs.at[row_ids, at].set(log_prob),
        )
        logits, cache = model.decode(token, angles, ~done, cache, layers)
        positions += ~done
        done |= jnp.isin(token, stop_ids)
        # Carried from token to token, they are computed once: XLA on CPU would do it again for every head of every layer.
        return at + 1, done, logits, positions, model.angles(positions), cache, completion

    empty = Completion(jnp.zeros((rows, limit), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, limit), jnp.float32))
    done = jnp.zeros(rows, bool) if active is None else ~active
    carry = (jnp.int32(0), done, logits, positions, model.angles(positions), cache, empty)
    for slots in stages(cache.slots):
        last = slots == cache.slots

        def more(carry, slots=slots, last=last):
            at, done, *_, part, _ = carry
            room = last or jnp.where(done, 0, part.lengths).max() < slots
            return (at < limit) & ~done.all() & room

        *head, cache, completion = carry
        part = cache if last else cache.first(slots)
        *head, part, completion = jax.lax.while_loop(more, step, (*head, part, completion))
        carry = (*head, part if last else cache.with_first(part), completion)
    *_, cache, completion = carry
    return completion, cache.stacked() if unrolled else cache


def stages(slots: int) -> list[int]:
    """How many of a cache's slots decoding reads, one size after the other: all at last, and halves before as long as they
    are worth a loop of their own.
    """
    sizes = [slots]
    while len(sizes) < STAGES and sizes[0] >= 2 * SHORTEST:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def uniform(keys: jax.Array) -> jax.Array:
    """A number float32 [B] from 0 to 1 for each key [B]."""
    return jax.vmap(jax.random.uniform)(keys)


def sample(logits: jax.Array, points: jax.Array, temperature: float, top_p: float) -> tuple[jax.Array, jax.Array]:
    """One token int32 [B] from logits [B, V] and its log-probability float32 [B] under the untruncated policy.

    points: see `draw`.
    """
    # Whole on each device: split over a vocabulary, the sums below would send each intermediate of this size.
    logits = sharding.constrain(logits, "batch", None)
    log_probs = jax.nn.log_softmax(logits / temperature if temperature else logits)
    if not temperature:
        token = jnp.argmax(log_probs, axis=-1)
    else:
        token = draw(points, jnp.exp(log_probs if top_p == 1.0 else nucleus(log_probs, top_p)))
    return token.astype(jnp.int32), jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def draw(points: jax.Array, weights: jax.Array) -> jax.Array:
    """Index int32 [B] drawn in proportion to weights float32 [B, V] that are not negative, by uniform numbers float32 [B].

    The inverse of the distribution function needs one random number where Gumbel's trick needs V; it sums by blocks, since a
    running sum over a whole vocabulary is slow, and inexact in float32.
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    ends = jnp.cumsum(blocks.sum(-1), axis=-1)
    point = jnp.minimum(points, BELOW) * ends[:, -1]
    block = (ends <= point[:, None]).sum(-1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inner = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], axis=-1)
    rest = jnp.minimum(point - before, inner[:, -1] * BELOW)
    return (block * BLOCK + (inner <= rest[:, None]).sum(-1)).astype(jnp.int32)


def nucleus(log_probs: jax.Array, top_p: float) -> jax.Array:
    """log_probs [B, V] with -inf outside the smallest set of most likely tokens whose probability reaches `top_p`."""
    ordered = -jnp.sort(-log_probs, axis=-1)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= least, log_probs, -jnp.inf)
