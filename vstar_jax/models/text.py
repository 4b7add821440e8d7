"""Qwen2.5's decoder: grouped-query attention with M-RoPE and SwiGLU, stacked and scanned (HF Qwen2_5_VLTextModel)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vstar_jax.batch import Array
from vstar_jax.models import rope
from vstar_jax.models.attention import attention, attention_after, attention_cached
from vstar_jax.models.config import TextArchitecture
from vstar_jax.models.layers import Linear, RMSNorm, SwiGLU, parameter, scan_layers
from vstar_jax.sharding import constrain

Angles = tuple[jax.Array, jax.Array]
"""cos and sin float32 [B, S, d / 2] of the positions of tokens."""


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "lengths", "prefix"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """keys [L, B, K, d, T], values [L, B, K, T, d], or arrays for each layer; lengths int32 [B], the filled slots of each row.

    So laid out, scores and the sums that they weigh are plain products of matrices. prefix: the cache of B / G prompts, of
    which row b continues number b // G, or None when rows stand for themselves.
    """

    keys: Any
    values: Any
    lengths: jax.Array
    prefix: "KVCache | None" = None

    @classmethod
    def empty(cls, cfg: TextArchitecture, rows: int, slots: int, dtype: jnp.dtype) -> "KVCache":
        """A cache of `slots` tokens for each of `rows` sequences."""
        return cls(*_zeros((cfg.layers, rows, cfg.kv_heads, slots, cfg.head_dim), dtype), jnp.zeros(rows, jnp.int32))

    def grown(self, slots: int) -> "KVCache":
        """The same cache with room for `slots` more tokens in each row."""
        same, more = (0, 0), (0, slots)
        keys = jnp.pad(self.keys, (same, same, same, same, more))
        return replace(self, keys=keys, values=jnp.pad(self.values, (same, same, same, more, same)))

    @property
    def slots(self) -> int:
        """Slots T of each row, filled or not."""
        return jax.tree.leaves(self.keys)[0].shape[-1]

    def first(self, slots: int) -> "KVCache":
        """The same rows with their first `slots` slots alone."""
        keys = jax.tree.map(lambda x: x[..., :slots], self.keys)
        return replace(self, keys=keys, values=jax.tree.map(lambda x: x[..., :slots, :], self.values))

    def with_first(self, part: "KVCache") -> "KVCache":
        """The same cache after tokens were appended to `part`, its first slots."""

        def put(whole: jax.Array, first: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(whole, first, (0,) * whole.ndim)

        keys, values = (jax.tree.map(put, a, b) for a, b in ((self.keys, part.keys), (self.values, part.values)))
        return replace(self, keys=keys, values=values, lengths=part.lengths)

    def by_layer(self) -> "KVCache":
        """The same cache with an array for each layer: a step then reads it where it lies, and the layers are unrolled."""
        prefix = self.prefix and self.prefix.by_layer()
        return KVCache(tuple(self.keys), tuple(self.values), self.lengths, prefix)

    def stacked(self) -> "KVCache":
        """The same cache with all layers in one array, over which `scan` runs."""
        prefix = self.prefix and self.prefix.stacked()
        return KVCache(jnp.stack(self.keys), jnp.stack(self.values), self.lengths, prefix)

    def shared(self, members: int, slots: int) -> "KVCache":
        """An empty cache of `slots` tokens for each of `members` rows that continue each of this cache's rows."""
        layers, rows, kv_heads, dim, _ = self.keys.shape
        empty = _zeros((layers, rows * members, kv_heads, slots, dim), self.keys.dtype)
        return KVCache(*empty, jnp.zeros(rows * members, jnp.int32), self)


def _zeros(shape: Sequence[int], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a cache, the values of `shape`."""
    values = constrain(jnp.zeros(shape, dtype), None, "batch", "kv_heads", None, None)
    return values.swapaxes(3, 4), values


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU; q, k and v have biases."""

    def __init__(self, cfg: TextArchitecture, *, dtype, param_dtype, stack: int, rngs: nnx.Rngs):
        norm = dict(param_dtype=param_dtype, stack=stack, rngs=rngs)
        options = dict(dtype=dtype, std=cfg.initializer_range, **norm)
        width, dim = cfg.hidden, cfg.head_dim
        self.input_norm = RMSNorm(width, cfg.norm_eps, **norm)
        self.post_attention_norm = RMSNorm(width, cfg.norm_eps, **norm)
        self.q_proj = Linear((width,), (cfg.heads, dim), ("embed", "heads", None), bias=True, **options)
        self.k_proj = Linear((width,), (cfg.kv_heads, dim), ("embed", "kv_heads", None), bias=True, **options)
        self.v_proj = Linear((width,), (cfg.kv_heads, dim), ("embed", "kv_heads", None), bias=True, **options)
        self.o_proj = Linear((cfg.heads, dim), (width,), ("heads", None, "embed"), **options)
        self.mlp = SwiGLU(width, cfg.intermediate, bias=False, **options)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, S, N, d] and k, v [B, S, K, d] of the normed input, q and k turned."""
        h = self.input_norm(x)
        q = constrain(self.q_proj(h), "batch", None, "heads", None)
        k = constrain(self.k_proj(h), "batch", None, "kv_heads", None)
        v = constrain(self.v_proj(h), "batch", None, "kv_heads", None)
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The residual path after attention: output projection and feed-forward."""
        x = constrain(x + self.o_proj(attended), "batch", None, None)
        return constrain(x + self.mlp(self.post_attention_norm(x)), "batch", None, None)


class TextModel(nnx.Module):
    """Token embedding, L scanned layers, final norm, and the vocabulary projection (tied to the embedding or not)."""

    def __init__(self, cfg: TextArchitecture, *, dtype, param_dtype, remat: str, rngs: nnx.Rngs):
        self.cfg, self.dtype, self.remat = cfg, dtype, remat
        options = dict(param_dtype=param_dtype, rngs=rngs)
        self.embedding = parameter(rngs, (cfg.vocab, cfg.hidden), ("vocab", "embed"), param_dtype, cfg.initializer_range)
        self.layers = DecoderLayer(cfg, dtype=dtype, stack=cfg.layers, **options)
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps, **options)
        head = dict(dtype=dtype, **options)
        self.lm_head = None if cfg.tie_embeddings else Linear((cfg.hidden,), (cfg.vocab,), ("embed", "vocab"), **head)

    def embed(self, tokens: Array) -> jax.Array:
        """int32 [B, S] -> [B, S, D]."""
        return constrain(self.embedding[...][tokens].astype(self.dtype), "batch", None, None)

    def embed_by_width(self, tokens: Array) -> jax.Array:
        """`embed` where every device looks its own part of the width up for all rows, and rows are exchanged for widths.

        What is sent is of the size of the activations: neither the table nor its gradient is ever whole on a device.
        """
        x = self.embedding[...][constrain(jnp.asarray(tokens), "replica", None)].astype(self.dtype)
        return constrain(constrain(x, "replica", None, "embed"), "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, self.embedding[...].astype(self.dtype)).astype(jnp.float32)

    def __call__(self, x: jax.Array, positions: Array, segments: Array | None) -> jax.Array:
        """Hidden states [B, S, D] of whole sequences, for training.

        x [B, S, D]; positions int32 [B, S, 3]; segments int32 [B, S] when rows are packed, else None: padding at the end of
        a row needs no mask under causal attention.
        """
        cos, sin = self.angles(positions)

        def body(layer: DecoderLayer, x):
            q, k, v = layer.project(x, cos, sin)
            return layer.finish(x, attention(q, k, v, causal=True, segments=segments))

        return self.norm(scan_layers(self.layers, body, x, self.remat))

    def each_layer(self) -> list[DecoderLayer]:
        """The layers one by one, for `extend` with a cache that has an array for each; of the type that they compute in."""
        graphdef, stacked = nnx.split(self.layers)

        def taken(index: int) -> DecoderLayer:
            return nnx.merge(graphdef, jax.tree.map(lambda x: x[index].astype(self.dtype), stacked))

        return [taken(index) for index in range(self.cfg.layers)]

    def extend(
        self, x: jax.Array, angles: Angles, added: Array, cache: KVCache, layers: Sequence[DecoderLayer] | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Appends tokens to each row's cache at its own cursor: prefill, the next turn's input, or one decoded token.

        x [B, S, D]; angles: of its positions; added int32 [B], how many of the S tokens the row really has (padding at the end
        leaves nothing behind: the next call writes over it); layers: of `each_layer`, when the cache has an array for each.
        Returns hidden states [B, S, D] and the grown cache.
        """
        cos, sin = angles
        slots = cache.lengths[:, None] + jnp.arange(x.shape[1])
        prefix = cache.prefix

        def append(layer: DecoderLayer, x, keys, values, at, ahead):
            """One layer; at: the index of the layer in keys and values, () where they are its own."""
            q, k, v = layer.project(x, cos, sin)
            keys, values = _stored(keys, k, slots, at, -1), _stored(values, v, slots, at, -2)
            own = keys[at].astype(q.dtype), values[at].astype(q.dtype)
            out = attention_cached(q, *own, slots) if ahead is None else attention_after(ahead, q, *own, slots)
            return layer.finish(x, out), keys, values

        def ahead(index):
            if prefix is None:
                return None
            return prefix.keys[index].astype(x.dtype), prefix.values[index].astype(x.dtype), prefix.lengths

        if layers is not None:
            grown = []
            for index, layer in enumerate(layers):
                x, *own = append(layer, x, cache.keys[index], cache.values[index], (), ahead(index))
                grown.append(own)
            keys, values = (tuple(arrays) for arrays in zip(*grown, strict=True))
        else:

            def body(layer: DecoderLayer, carry, index):
                x, keys, values = carry
                return append(layer, x, keys, values, (index,), ahead(index))

            carry = (x, cache.keys, cache.values)
            x, keys, values = scan_layers(self.layers, body, carry, "none", jnp.arange(self.cfg.layers))
        return self.norm(x), KVCache(keys, values, cache.lengths + added, prefix)

    def angles(self, positions: Array) -> Angles:
        """By which queries and keys at positions int32 [B, S, 3] are turned."""
        return rope.mrope(positions, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.mrope_section)


def _stored(cache: jax.Array, new: jax.Array, slots: Array, at: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """A layer's keys or values, or those of all layers with `at` the layer's index, with new [B, S, K, d] in the slots int32
    [B, S] of each row along `axis`; slots behind the last one are left out.

    By rows, so that the compiler knows that no row's new ones are for another device.
    """
    ahead = (slice(None),) * (3 + axis)

    def stored(cache: jax.Array, new: jax.Array, slots: Array) -> jax.Array:
        new = new if at else jnp.moveaxis(new, 0, axis)  # two indices with axes between them put slots first, one leaves them
        return cache.at[(*at, *ahead, slots)].set(new, mode="drop")

    return jax.vmap(stored, (len(at), 0, 0), len(at))(cache, new.astype(cache.dtype), slots)
