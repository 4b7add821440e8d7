"""Attention against its formula in numpy, for every mask that the model uses, and over groups of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vstar_jax import sharding
from vstar_jax.batch import Groups, group
from vstar_jax.models.attention import SPLASH_BLOCK, attention, attention_cached
from vstar_jax.models.vision import attend_in_groups

TOLERANCE = 1e-5  # float32 against float64
BF16_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits

B, S, T, N, K, D = 2, 6, 6, 4, 2, 8


def arrays(*shapes: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def formula(q, k, v, sees) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v in float64; sees bool, broadcast to [B, N, S, T]."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bsnd,btnd->bnst", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(sees, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnst,btnd->bsnd", weights / weights.sum(-1, keepdims=True), v)


CAUSAL = np.tril(np.ones((S, T), bool))
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]], np.int32)
SLOTS = np.asarray([[0, 1, 2, 3, 4, 5], [3, 4, 5, 5, 5, 5]], np.int32)
LENGTHS = np.asarray([4, 1], np.int32)
SAME = SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]

MASKS = {
    "nothing hidden": ({}, np.ones(1, bool)),
    "causal": ({"causal": True}, CAUSAL),
    "packed": ({"causal": True, "segments": SEGMENTS}, CAUSAL & SAME),
    "the first keys": ({"lengths": LENGTHS}, (np.arange(T) < LENGTHS[:, None])[:, None, None, :]),
    "packed, the first keys": (
        {"causal": True, "segments": SEGMENTS, "lengths": np.asarray([6, 5], np.int32)},
        CAUSAL & SAME & (np.arange(T) < np.asarray([[6], [5]]))[:, None, None, :],
    ),
}


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)], ids=["grouped", "one KV head", "KV head each"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_its_formula(mask, heads):
    options, sees = MASKS[mask]
    q, k, v = arrays((B, S, heads[0], D), (B, T, heads[1], D), (B, T, heads[1], D))
    out = attention(q, k, v, **options)
    np.testing.assert_allclose(out, formula(q, k, v, sees), rtol=0, atol=TOLERANCE)


def test_bfloat16_comes_out_as_it_went_in_and_near_the_formula():
    q, k, v = arrays((B, S, N, D), (B, T, K, D), (B, T, K, D), dtype="bfloat16")
    out = attention(q, k, v, causal=True, segments=SEGMENTS)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), formula(q, k, v, CAUSAL & SAME), rtol=0, atol=BF16_TOLERANCE)


@pytest.mark.parametrize("slots", [np.asarray([[4], [8]], np.int32), SLOTS], ids=["one query", "several"])
def test_queries_of_a_cache_see_the_keys_up_to_their_own_slots(slots):
    q, k, v = arrays((B, slots.shape[1], N, D), (B, 9, K, D), (B, 9, K, D))
    expected = formula(q, k, v, np.arange(9) <= slots[:, None, :, None])
    found = attention_cached(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), slots)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def gradients(groups: Groups, q, k, v, weight) -> list[np.ndarray]:
    """Gradients of a weighted sum of the output to q, k and v."""
    loss = lambda q, k, v: (attend_in_groups(q, k, v, groups) * weight).sum()  # noqa: E731
    return [np.asarray(g) for g in jax.grad(loss, argnums=(0, 1, 2))(q, k, v)]


def test_groups_given_by_index_equal_groups_in_order():
    q, k, v, weight = arrays(*[(B, 12, N, D)] * 4)
    whole = Groups(None, 4)
    listed = Groups(np.broadcast_to(np.arange(12, dtype=np.int32).reshape(3, 4), (B, 3, 4)), 4)
    np.testing.assert_allclose(attend_in_groups(q, k, v, listed), attend_in_groups(q, k, v, whole), rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(gradients(listed, q, k, v, weight), gradients(whole, q, k, v, weight), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_patches_attend_inside_their_group_only():
    """Rows of unlike groups, one much shorter than the other: a group of the shorter row is all padding."""
    ids = [[np.asarray([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])], [np.asarray([0, 0])]]
    groups = group(ids, 12)
    q, k, v, weight = arrays(*[(2, 12, N, D)] * 4)
    out = attend_in_groups(q, k, v, groups)
    for row, (numbers,) in enumerate(ids):
        here = slice(0, len(numbers))
        expected = formula(*(x[row : row + 1, here] for x in (q, k, v)), numbers[:, None] == numbers)
        np.testing.assert_allclose(out[row : row + 1, here], expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(out[row, len(numbers) :], 0)
    for gradient in gradients(groups, q, k, v, weight):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1, 2:], 0)


def test_one_short_group_beside_padding_has_exact_gradients():
    """A gradient through empty slots must not differ from one without them."""
    q, k, v, weight = arrays(*[(1, 6, N, D)] * 4)
    ragged = group([[np.asarray([0, 0, 0, 0, 1, 1])]], 6)
    assert ragged.index is not None
    got = gradients(ragged, q, k, v, weight)
    for part in (slice(0, 4), slice(4, 6)):
        alone = Groups(None, part.stop - part.start)
        want = gradients(alone, *(x[:, part] for x in (q, k, v, weight)))
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours[:, part], theirs, rtol=0, atol=TOLERANCE)


def test_the_tpu_kernel_equals_the_formula(monkeypatch):
    """Pallas interprets the kernel here; on a TPU it is compiled."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make, made = splash.make_splash_mha, []

    def interpreted(*arguments, **options):
        made.append(options)
        return make(*arguments, **options, interpret=True)

    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    length, dim = SPLASH_BLOCK, 128
    q, k, v = arrays((2, length, 4, dim), (2, length, 2, dim), (2, length, 2, dim))
    segments = np.where(np.arange(length) < [[40], [128]], 1, 2).astype(np.int32)
    segments[0, 100:] = 0
    causal = np.tril(np.ones((length, length), bool))
    same = segments[:, None, :, None] == segments[:, None, None, :]
    plain, packed = attention(q, k, v, causal=True), attention(q, k, v, causal=True, segments=segments)
    np.testing.assert_allclose(plain, formula(q, k, v, causal), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(packed, formula(q, k, v, causal & same), rtol=0, atol=TOLERANCE)
    with jax.set_mesh(sharding.make_mesh("2x4")):
        split = jax.jit(lambda *x: attention(*x, causal=True, segments=segments))(q, k, v)
    np.testing.assert_allclose(split, packed, rtol=0, atol=TOLERANCE)
    assert len(made) == 3
