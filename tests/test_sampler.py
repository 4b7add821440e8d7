"""Claims about decoding: rows keep their own cursor and randomness, stops are kept, truncation is what top-p says."""

from dataclasses import replace

import dialogues as d
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vstar_jax.batch import collate
from vstar_jax.config import PolicyConfig
from vstar_jax.models.qwen2_5_vl import create
from vstar_jax.models.text import KVCache
from vstar_jax.rollout import sampler
from vstar_jax.rollout.sampler import BLOCK, decode, draw, nucleus, prefill, sample
from vstar_jax.sharding import put_batch, state_shardings

LIMIT = 6
LOG_PROB = 1e-4  # float32 sums of another order between decoding with a cache and one pass over the whole sequence


@pytest.fixture(scope="module")
def model():
    return create(d.ARCHITECTURE, PolicyConfig(), 0)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    clip = d.clip(rng, "video", 2, 4, 4)
    return [d.dialogue(rng, n, clip, n + 2).example for n in (3, 5, 7, 9, 4, 6, 8, 5)]


def completions(model, examples, keys, mesh, *, temperature=1.0, stop=(), top_p=1.0, slots=32 + LIMIT):
    """Tokens, lengths and log-probs of decoding the examples on a mesh."""
    graphdef, state = nnx.split(model)
    batch = collate([[e] for e in examples], (32,), (64,))
    starts = jnp.asarray([e.positions.max() + 1 for e in examples])
    with jax.set_mesh(mesh):
        state, batch = jax.device_put(state, state_shardings(state, mesh)), put_batch(batch, mesh)

        @jax.jit
        def run(state, batch):
            model = nnx.merge(graphdef, state)
            cache = KVCache.empty(model.text.cfg, len(examples), slots, model.text.dtype)
            logits, cache = prefill(model, batch, cache)
            stops = jnp.asarray(stop, jnp.int32)
            return decode(model, logits, starts, cache, keys, stops, limit=LIMIT, temperature=temperature, top_p=top_p)

        completion, cache = run(state, batch)
    return jax.device_get(completion), jax.device_get(cache.lengths)


def keys_of(indices):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.asarray(indices))


def test_a_row_samples_the_same_tokens_in_any_batch_order_and_on_any_mesh(model, rows, mesh):
    reference, _ = completions(model, rows, keys_of(range(8)), mesh("1x1"))
    assert len({tuple(row) for row in reference.tokens}) > 1
    for shape in ("8x1", "4x2"):
        other, _ = completions(model, rows, keys_of(range(8)), mesh(shape))
        np.testing.assert_array_equal(other.tokens, reference.tokens)
    order = [5, 2, 7, 0]
    fewer, _ = completions(model, [rows[i] for i in order], keys_of(order), mesh("1x1"))
    np.testing.assert_array_equal(fewer.tokens, reference.tokens[order])


def test_another_key_samples_other_tokens(model, rows, mesh):
    one, _ = completions(model, rows, keys_of(range(8)), mesh("1x1"))
    other, _ = completions(model, rows, keys_of(range(8, 16)), mesh("1x1"))
    assert (one.tokens != other.tokens).any()


def test_a_row_ends_with_its_stop_token_and_the_cache_holds_exactly_what_was_read(model, rows, mesh):
    free, _ = completions(model, rows, keys_of(range(8)), mesh("1x1"), temperature=0.0)
    stop = int(free.tokens[0, 2])
    stopped, filled = completions(model, rows, keys_of(range(8)), mesh("1x1"), temperature=0.0, stop=(stop,))
    for row in range(8):
        where = np.flatnonzero(free.tokens[row] == stop)
        length = int(where[0]) + 1 if len(where) else LIMIT
        assert stopped.lengths[row] == length
        np.testing.assert_array_equal(stopped.tokens[row, :length], free.tokens[row, :length])
        assert not stopped.tokens[row, length:].any()
        assert filled[row] == len(rows[row].tokens) + length
    assert stopped.lengths[0] < LIMIT


@pytest.mark.parametrize("shape", ["1x1", "4x2"])
def test_a_cache_that_is_read_in_stages_gives_the_same_tokens(model, rows, mesh, monkeypatch, shape):
    """Of short prompts: their rows write over the end of one stage and into the next."""
    lengths = [len(row.tokens) for row in rows]
    few, slots = [rows[n] for n in np.argsort(lengths)[:4]], 4 * (min(lengths) + 2)
    whole, filled = completions(model, few, keys_of(range(4)), mesh(shape), slots=slots)
    monkeypatch.setattr(sampler, "SHORTEST", 8)
    assert sampler.stages(slots) == [slots // 4, slots // 2, slots]
    assert max(len(row.tokens) for row in few) - 1 > slots // 4 > min(lengths)
    staged, same = completions(model, few, keys_of(range(4)), mesh(shape), slots=slots)
    np.testing.assert_array_equal(staged.tokens, whole.tokens)
    np.testing.assert_allclose(staged.log_probs, whole.log_probs, atol=LOG_PROB)
    np.testing.assert_array_equal(same, filled)


def test_a_short_row_alone_never_reads_the_end_of_a_long_cache(model, rows, monkeypatch):
    """The last stage's loop does not turn: what lies behind its beginning is as it was."""
    monkeypatch.setattr(sampler, "SHORTEST", 8)
    batch = collate([[rows[0]]], (32,), (64,))
    length = len(rows[0].tokens)
    cache = KVCache.empty(model.text.cfg, 1, 8 * length, model.text.dtype)
    logits, cache = prefill(model, batch, cache)
    marked = replace(cache, values=cache.values.at[..., 4 * length :, :].set(jnp.nan))  # times a weight of 0 it is NaN
    starts, none = jnp.asarray([rows[0].positions.max() + 1]), jnp.zeros(0, jnp.int32)
    done, _ = decode(model, logits, starts, marked, keys_of([0]), none, limit=LIMIT, temperature=1.0)
    assert np.isfinite(done.log_probs).all()
    monkeypatch.setattr(sampler, "SHORTEST", 1 << 20)
    done, _ = decode(model, logits, starts, marked, keys_of([0]), none, limit=LIMIT, temperature=1.0)
    assert not np.isfinite(done.log_probs).all()


def test_recorded_log_probs_are_the_policys_on_the_same_tokens(model, rows, mesh):
    temperature = 0.7
    completion, _ = completions(model, rows, keys_of(range(8)), mesh("1x1"), temperature=temperature, top_p=0.5)
    example = rows[0]
    tokens = np.concatenate([example.tokens, completion.tokens[0]])
    extra = example.positions.max() + 1 + np.arange(LIMIT)
    whole = type(example)(
        tokens=tokens,
        positions=np.concatenate([example.positions, np.repeat(extra[:, None], 3, 1)]),
        loss_mask=np.zeros(len(tokens), bool),
        visual_index=np.concatenate([example.visual_index, np.full(LIMIT, -1)]),
        patches=example.patches,
        patch_hw=example.patch_hw,
        window_id=example.window_id,
        frame_id=example.frame_id,
    )
    logits = model.logits(model.hidden(collate([[whole]], (64,), (64,))))[0] / temperature
    log_probs = jax.nn.log_softmax(logits)
    at = np.arange(len(example.tokens) - 1, len(tokens) - 1)
    expected = log_probs[at, tokens[at + 1]]
    np.testing.assert_allclose(completion.log_probs[0], expected, atol=LOG_PROB)


def test_top_p_keeps_the_smallest_set_of_tokens_that_reaches_it():
    log_probs = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]]))
    kept = np.isfinite(nucleus(log_probs, 0.7))
    np.testing.assert_array_equal(kept, [[True, True, False, False], [False, True, False, False]])


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_draws_follow_weights_over_many_blocks_and_take_no_index_of_weight_zero(vocab):
    draws, rng = 20_000, np.random.default_rng(vocab)
    weights = rng.random(vocab) ** 4 * (rng.random(vocab) < 0.3)
    weights[[0, -1]] = 0.0  # the ends, where rounding would go wrong first
    weights[vocab // 2] = 1.0
    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (draws, vocab))
    drawn = np.asarray(draw(jax.random.uniform(jax.random.key(0), draws), rows))
    assert drawn.dtype == np.int32
    assert (weights[drawn] > 0).all()
    expected = weights / weights.sum()
    frequencies = np.bincount(drawn, minlength=vocab) / draws
    # Five standard errors of a frequency.
    assert (abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


def test_sampling_follows_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    points = jax.random.uniform(jax.random.key(0), 4000)
    tokens, _ = sample(jnp.broadcast_to(jnp.log(probabilities), (4000, 4)), points, 1.0, 1.0)
    frequencies = np.bincount(np.asarray(tokens), minlength=4) / 4000
    # Four standard errors of a frequency over 4,000 draws.
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * 0.5 / np.sqrt(4000))
