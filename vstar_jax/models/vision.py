"""Qwen2.5-VL's vision tower: patches in, visual tokens out (HF Qwen2_5_VisionTransformerPretrainedModel).

Most layers attend inside windows of 112 x 112 pixels, a few inside whole frames (one temporal patch); no layer looks across
frames. The host hands patches over in window order with their groups (`batch.Vision`), so a window layer is one dense batch
[windows, 64, heads, d], a full one [frames, patches, heads, d], and the merged tokens are put in their place later by index.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vstar_jax.batch import MERGE, PATCH_VALUES, Array, Groups, Vision
from vstar_jax.models import rope
from vstar_jax.models.attention import attention
from vstar_jax.models.config import VisionArchitecture
from vstar_jax.models.layers import Linear, RMSNorm, SwiGLU, scan_layers
from vstar_jax.sharding import constrain

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(patches: Array) -> jax.Array:
    """uint8 [..., 1176] -> float32, by CLIP's mean and deviation; a row is channel-major (3, 2, 14, 14)."""
    mean, std = (np.repeat(np.asarray(c, np.float32), PATCH_VALUES // 3) for c in (CLIP_MEAN, CLIP_STD))
    return (jnp.asarray(patches, jnp.float32) / 255.0 - mean) / std


def attend_in_groups(q: jax.Array, k: jax.Array, v: jax.Array, groups: Groups) -> jax.Array:
    """Attention of q, k, v [B, P, N, d] inside each group of patches; returns [B, P, N, d]."""
    rows, count, heads, dim = q.shape
    if groups.index is None:
        q, k, v = (x.reshape(-1, groups.size, heads, dim) for x in (q, k, v))
        return attention(q, k, v).reshape(rows, count, heads, dim)
    index = jnp.asarray(groups.index).reshape(rows, -1)

    def gather(x):
        return jnp.take_along_axis(x, index[:, :, None, None], axis=1, mode="fill", fill_value=0)

    q, k, v = (gather(x).reshape(-1, groups.size, heads, dim) for x in (q, k, v))
    # A group that is all padding keeps its first key, so that its softmax is defined.
    lengths = jnp.maximum((index < count).reshape(-1, groups.size).sum(axis=1, dtype=jnp.int32), 1)
    out = attention(q, k, v, lengths=lengths).reshape(rows, -1, heads, dim)
    scatter = jax.vmap(lambda to, at, x: to.at[at].set(x, mode="drop", unique_indices=False))
    return scatter(jnp.zeros((rows, count, heads, dim), out.dtype), index, out)


class VisionBlock(nnx.Module):
    """Pre-norm attention inside groups, then SwiGLU; all linear layers have biases."""

    def __init__(self, cfg: VisionArchitecture, *, dtype, param_dtype, stack: int, rngs: nnx.Rngs):
        heads, dim = cfg.heads, cfg.hidden // cfg.heads
        norm = dict(param_dtype=param_dtype, stack=stack, rngs=rngs)
        options = dict(dtype=dtype, **norm)
        self.norm1 = RMSNorm(cfg.hidden, cfg.norm_eps, **norm)
        self.norm2 = RMSNorm(cfg.hidden, cfg.norm_eps, **norm)
        self.qkv = Linear((cfg.hidden,), (3, heads, dim), ("embed", None, "heads", None), bias=True, **options)
        self.proj = Linear((heads, dim), (cfg.hidden,), ("heads", None, "embed"), bias=True, **options)
        self.mlp = SwiGLU(cfg.hidden, cfg.intermediate, bias=True, **options)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, vision: Vision, full: jax.Array | bool) -> jax.Array:
        qkv = constrain(self.qkv(self.norm1(x)), "batch", None, None, "heads", None)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if isinstance(full, bool):
            out = attend_in_groups(q, k, v, vision.frames if full else vision.windows)
        else:
            out = jax.lax.cond(
                full,
                partial(attend_in_groups, groups=vision.frames),
                partial(attend_in_groups, groups=vision.windows),
                q,
                k,
                v,
            )
        x = constrain(x + self.proj(out), "batch", None, None)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None)


class VisionTower(nnx.Module):
    """Patch embedding, L scanned blocks, and the merger that joins 2 x 2 patches into a visual token."""

    def __init__(self, cfg: VisionArchitecture, *, dtype, param_dtype, remat: str, rngs: nnx.Rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        merged = cfg.hidden * MERGE
        self.cfg, self.remat, self.dtype = cfg, remat, dtype
        self.patch_embed = Linear((PATCH_VALUES,), (cfg.hidden,), (None, "embed"), **options)
        self.blocks = VisionBlock(cfg, stack=cfg.layers, **options)
        self.merger_norm = RMSNorm(cfg.hidden, cfg.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.merger_in = Linear((merged,), (merged,), ("embed", "mlp"), bias=True, **options)
        self.merger_out = Linear((merged,), (cfg.out_hidden,), ("mlp", "embed"), bias=True, **options)

    def __call__(self, vision: Vision) -> jax.Array:
        """Visual tokens [B, P / 4, D] in the order of the patches."""
        cfg = self.cfg
        x = self.patch_embed(normalise(vision.patches).astype(self.dtype))
        x = constrain(x, "batch", None, None)
        cos, sin = rope.axial(vision.patch_hw, cfg.hidden // cfg.heads)
        full = np.isin(np.arange(cfg.layers), cfg.full_attention_layers)
        same = vision.windows.index is None and vision.frames.index is None and vision.windows.size == vision.frames.size
        if full.all() or same or not full.any():
            kind = bool(full.all()) or same
            x = scan_layers(self.blocks, lambda block, x: block(x, cos, sin, vision, kind), x, self.remat)
        else:
            x = scan_layers(self.blocks, lambda block, x, f: block(x, cos, sin, vision, f), x, self.remat, jnp.asarray(full))
        x = self.merger_norm(x).reshape(x.shape[0], -1, cfg.hidden * MERGE)
        return self.merger_out(jax.nn.gelu(self.merger_in(x), approximate=False))
