"""One attention function for the tower and the language model; it picks the best kernel that JAX has on the platform.

GPU in 16 bits: cuDNN's flash attention. TPU: the splash kernel, for long causal self-attention. Anything else, and short or
oddly shaped problems: XLA.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vstar_jax import sharding
from vstar_jax.batch import Array

SPLASH_BLOCK = 128
QUERY_BLOCK = 512  # queries of a long turn whose scores over a cache exist at a time
CAUSAL_BLOCKS = 4  # 5/8 of the scores of one block; more save little, and each is compiled on its own
HIDDEN = -1e30  # score of a hidden key: finite, so that a query that sees no key gives no NaN


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    segments: Array | None = None,
    lengths: Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with grouped heads; softmax in float32.

    Args:
        q: [B, S, N, d]; k, v: [B, T, K, d] with N a multiple of K.
        causal: query i sees keys up to i (S equals T).
        segments: int32 [B, S]; query and key must be of the same segment (S equals T). Padding is segment 0 and sees itself,
            so no row of scores is empty.
        lengths: int32 [B]; how many keys exist, the first ones of the T. Every row needs at least one.

    Returns [B, S, N, d] in the type of q.
    """
    platform = sharding.platform()
    if platform == "tpu" and causal and lengths is None and q.shape[1] % SPLASH_BLOCK == 0 and q.shape[-1] % 128 == 0:
        return _by_device(_splash, q, k, v, segments)
    if _flash(q):
        return _by_device(partial(_cudnn, causal), q, k, v, segments, lengths)
    mask = _same(segments)
    if lengths is not None:
        exist = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None]
        mask = exist if mask is None else mask & exist
    return _plain(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, causal)


def attention_cached(q: jax.Array, k: jax.Array, v: jax.Array, q_slots: Array) -> jax.Array:
    """`attention` over a cache, k [B, K, d, T], v [B, K, T, d]; query i sees keys up to slot q_slots[i], int32 [B, S]."""

    total = v.shape[2]

    def seen(slots: Array) -> jax.Array:
        return jnp.arange(total) <= slots[:, None, :, None]

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, slots: Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=seen(slots), implementation="cudnn")

    if _flash(q):
        return _by_device(kernel, q, k.transpose(0, 3, 1, 2), v.swapaxes(1, 2), q_slots)
    return _in_blocks(lambda q, slots: _plain(q, k.swapaxes(2, 3), v, seen(slots), False), q, q_slots)


def _in_blocks(attend: Callable[[jax.Array, Array], jax.Array], q: jax.Array, q_slots: Array) -> jax.Array:
    """`attend(q, q_slots)` for `QUERY_BLOCK` queries at a time, so that memory does not grow with S x T."""
    rows, length = q_slots.shape
    if length <= QUERY_BLOCK:
        return attend(q, q_slots)
    padding = -length % QUERY_BLOCK

    def split(x: Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, -1, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda block: attend(*block), (split(q), split(q_slots)))
    return out.swapaxes(0, 1).reshape(rows, -1, *q.shape[2:])[:, :length]


def _flash(q: jax.Array) -> bool:
    """Whether cuDNN has a kernel for it; a single query reads memory and computes little, which XLA does as well."""
    on_gpu = sharding.platform() in ("gpu", "cuda")
    return on_gpu and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[1] > 1


def attention_after(
    prefix: tuple[jax.Array, jax.Array, Array], q: jax.Array, k: jax.Array, v: jax.Array, q_slots: Array
) -> jax.Array:
    """`attention` over a prefix that G rows share and the slots of each row's own cache, as one softmax.

    Args:
        prefix: keys [B / G, K, d, T0], values [B / G, K, T0, d], and int32 [B / G], how many of the T0 slots are filled. Rows
            of a group stand side by side, so that row b has the prefix b // G, which is read once for all and never copied.
        q: [B, S, N, d]; k: [B, K, d, T]; v: [B, K, T, d]; q_slots int32 [B, S], the own slots that a query sees.

    Returns [B, S, N, d] in the type of q.
    """
    return _in_blocks(lambda q, slots: _after(prefix, q, k, v, slots), q, q_slots)


def _after(prefix: tuple[jax.Array, jax.Array, Array], q: jax.Array, k: jax.Array, v: jax.Array, q_slots: Array) -> jax.Array:
    """`attention_after` with the scores of all queries at once."""
    prefix_k, prefix_v, filled = prefix
    rows, length, heads, dim = q.shape
    groups, kv_heads, shared = prefix_v.shape[:3]
    members, repeats = rows // groups, heads // kv_heads

    def pinned(x: jax.Array) -> jax.Array:
        # Rows are regrouped on each device: left to itself, the compiler moves the scores of all heads from device to device.
        return sharding.constrain(x, "batch", "kv_heads", *(None,) * (x.ndim - 2))

    queries = (q * dim**-0.5).reshape(rows, length, kv_heads, repeats, dim).transpose(0, 2, 3, 1, 4)
    by_row = pinned(queries.reshape(rows, kv_heads, repeats * length, dim))
    by_group = by_row.reshape(groups, members, kv_heads, -1, dim).swapaxes(1, 2)
    by_group = pinned(pinned(by_group).reshape(groups, kv_heads, -1, dim))

    ahead = jnp.einsum("bkqd,bkdt->bkqt", by_group, prefix_k, preferred_element_type=jnp.float32)
    ahead = jnp.where((jnp.arange(shared) < filled[:, None])[:, None, None], ahead, HIDDEN)
    ahead = pinned(ahead.reshape(groups, kv_heads, members, -1, shared))
    ahead = pinned(ahead.swapaxes(1, 2).reshape(rows, kv_heads, -1, shared))
    own = jnp.einsum("bkqd,bkdt->bkqt", by_row, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(v.shape[2]) <= q_slots[:, None, None, :, None]
    own = jnp.where(seen, own.reshape(rows, kv_heads, repeats, length, -1), HIDDEN).reshape(own.shape)

    top = jnp.maximum(ahead.max(-1, keepdims=True), own.max(-1, keepdims=True))
    ahead, own = jnp.exp(ahead - top), jnp.exp(own - top)
    total = ahead.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    ahead, own = ahead.astype(v.dtype), own.astype(v.dtype)
    by_group = pinned(ahead.reshape(groups, members, kv_heads, -1, shared).swapaxes(1, 2))
    by_group = pinned(by_group.reshape(groups, kv_heads, -1, shared))
    by_group = jnp.matmul(by_group, prefix_v, preferred_element_type=jnp.float32)
    out = pinned(by_group.reshape(groups, kv_heads, members, -1, dim))
    out = pinned(out.swapaxes(1, 2).reshape(rows, kv_heads, -1, dim))
    out = ((out + jnp.matmul(own, v, preferred_element_type=jnp.float32)) / total).astype(v.dtype)
    return out.reshape(rows, kv_heads, repeats, length, dim).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """The formula for XLA, k and v [B, K, T, d] with heads ahead so that every product is a plain batched matrix product.

    XLA skips no hidden key: under a causal mask the queries go in blocks, each with the keys up to its own end.
    """
    rows, length, heads, dim = q.shape
    kv_heads = v.shape[1]
    q = (q * dim**-0.5).reshape(rows, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    mask = None if mask is None else jnp.broadcast_to(mask, (rows, 1, length, v.shape[2]))

    def block(start: int, end: int, keys: int) -> jax.Array:
        queries = q[:, :, :, start:end].reshape(rows, kv_heads, -1, dim)
        scores = jnp.einsum("bkqd,bktd->bkqt", queries, k[:, :, :keys], preferred_element_type=jnp.float32)
        scores = scores.reshape(rows, kv_heads, heads // kv_heads, end - start, keys)
        if causal:
            scores = jnp.where(np.tri(end - start, keys, start, bool), scores, HIDDEN)
        if mask is not None:
            scores = jnp.where(mask[:, :, None, start:end, :keys], scores, HIDDEN)
        # Divided after the product with the values, and the gradient of a row's sum is a product over d, not a sum over T.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights.astype(v.dtype).reshape(rows, kv_heads, -1, keys)
        out = jnp.matmul(weights, v[:, :, :keys], preferred_element_type=jnp.float32)
        return (out.reshape(*total.shape[:-1], dim) / total).astype(v.dtype)

    if causal:
        size = -(-length // CAUSAL_BLOCKS)
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        out = jnp.concatenate([block(start, end, end) for start, end in spans], axis=3)
    else:
        out = block(0, length, v.shape[2])
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def _same(segments: Array | None) -> jax.Array | None:
    """bool [B, 1, S, S], true where query and key are of one segment; None when rows are not packed."""
    return None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]


def _by_device(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *by_row: Array | None) -> jax.Array:
    """`kernel(q, k, v, *by_row)`, run by each device on its own rows and heads; by_row: arrays [B, ...], or None.

    The compiler does not see into a kernel: left to itself it had every device compute the gradient for the rows of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, *by_row)
    if k.shape[2] % mesh.shape["model"]:  # fewer KV heads than devices: give each query head its own copy
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    specs = [sharding.spec(("batch", None, "heads", None), x.shape, mesh) for x in (q, k, v)]
    rows = (P(specs[0][0]),) * len(by_row)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(*specs, *rows), out_specs=specs[0], check_vma=False)(q, k, v, *by_row)


def _cudnn(
    causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, lengths: jax.Array | None
) -> jax.Array:
    """cuDNN's flash attention. Lengths are its own; as a mask they would be a bias of T x T for each row."""
    return jax.nn.dot_product_attention(
        q, k, v, mask=_same(segments), is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The Pallas kernel for TPU, causal."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[1], q.shape[2]
    masks = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(masks, head_shards=1, q_seq_shards=1)
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    q, k, v = (x.swapaxes(1, 2) for x in (q * (q.shape[-1] ** -0.5), k, v))
    ids = splash.SegmentIds(q=segments, kv=segments)
    return jax.vmap(kernel)(q, k, v, segment_ids=ids).swapaxes(1, 2).astype(v.dtype)
