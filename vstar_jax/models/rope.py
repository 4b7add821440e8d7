"""Rotary position embeddings: M-RoPE of the language model and the axial one of the vision tower, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vstar_jax.batch import Array


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """float32 [dim / 2]: theta ** (-2i / dim)."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)


def mrope(positions: Array, head_dim: int, theta: float, sections: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [B, S, head_dim / 2] from positions int32 [B, S, 3].

    The half-dimensions are split in three consecutive sections that turn with time, height and width (Qwen2-VL, section
    2.1; chunked, not interleaved).
    """
    axis = np.repeat(np.arange(3), sections)
    angles = positions.astype(jnp.float32)[..., axis] * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def axial(rows_and_columns: Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [B, P, head_dim / 2] from int32 [B, P, 2]: rows turn the first half, columns the second."""
    angles = rows_and_columns.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim // 2, 10000.0)
    angles = angles.reshape(*angles.shape[:-2], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns x [B, S, N, d], whose halves are paired (i, i + d / 2), by cos and sin [B, S, d / 2]; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
