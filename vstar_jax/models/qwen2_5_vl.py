"""Qwen2.5-VL: the vision tower, the decoder, and the place where pictures become tokens.

The model sees plain arrays (`batch.Batch`); windows, grids and positions were computed on the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vstar_jax.batch import Array, Batch, Vision
from vstar_jax.config import PolicyConfig
from vstar_jax.errors import UserError
from vstar_jax.models.config import Architecture
from vstar_jax.models.text import Angles, KVCache, TextModel
from vstar_jax.models.vision import VisionTower
from vstar_jax.sharding import constrain


class Qwen25VL(nnx.Module):
    """The policy. Parameters are float32 or bfloat16 (`param_dtype`), activations `dtype`."""

    def __init__(self, architecture: Architecture, config: PolicyConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(
            dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype), remat=config.remat, rngs=rngs
        )
        self.architecture = architecture
        self.visual = VisionTower(architecture.vision, **options)
        self.text = TextModel(architecture.text, **options)

    def encode(self, vision: Vision) -> jax.Array:
        """Visual tokens [B, P / 4, D] of a batch's pictures."""
        return self.visual(vision)

    def embed(self, tokens: Array, visual_index: Array, visual: jax.Array | None) -> jax.Array:
        """Token embeddings [B, S, D], with visual[b, visual_index[b, s]] where the index is not -1."""
        return self._with_pictures(self.text.embed(tokens), visual_index, visual)

    def _with_pictures(self, x: jax.Array, visual_index: Array, visual: jax.Array | None) -> jax.Array:
        if visual is None:
            return x
        placed = jnp.take_along_axis(visual, jnp.maximum(visual_index, 0)[:, :, None], axis=1)
        return constrain(jnp.where((visual_index >= 0)[:, :, None], placed.astype(x.dtype), x), "batch", None, None)

    def hidden(self, batch: Batch, *, packed: bool = False) -> jax.Array:
        """Hidden states [B, S, D] of a batch; `packed` says that rows hold several dialogues, kept apart by segment."""
        visual = None if batch.vision is None else self.encode(batch.vision)
        x = self._with_pictures(self.text.embed_by_width(batch.tokens), batch.visual_index, visual)
        return self.text(x, batch.positions, batch.segments if packed else None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V]."""
        return self.text.logits(hidden)

    def extend(self, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Appends a batch's tokens (a prompt, or the next turn's input) to the cache; hidden states [B, S, D] and the cache."""
        visual = None if batch.vision is None else self.encode(batch.vision)
        x = self.embed(batch.tokens, batch.visual_index, visual)
        return self.text.extend(x, self.text.angles(batch.positions), (batch.segments > 0).sum(axis=1), cache)

    def angles(self, positions: jax.Array) -> Angles:
        """For `decode`, of the positions int32 [B] of one token a row."""
        return self.text.angles(jnp.broadcast_to(positions[:, None, None], (*positions.shape, 1, 3)))

    def decode(
        self, tokens: jax.Array, angles: Angles, active: jax.Array, cache: KVCache, layers: Any = None
    ) -> tuple[jax.Array, KVCache]:
        """One token a row: tokens int32 [B], the `angles` of their positions, active bool [B] (others leave the cache alone).

        layers: see `TextModel.extend`. Returns logits float32 [B, V] for the next token and the cache.
        """
        hidden, cache = self.text.extend(self.text.embed(tokens[:, None]), angles, active.astype(jnp.int32), cache, layers)
        return self.logits(hidden[:, 0]), cache


def check_mesh(architecture: Architecture, mesh: Any) -> None:
    """UserError when the `model` axis does not divide the attention heads of the tower or of the decoder."""
    model = mesh.shape["model"]
    for what, heads in (("text", architecture.text.heads), ("vision", architecture.vision.heads)):
        if heads % model:
            raise UserError(
                f"the model has {heads} {what} attention heads, which {model} devices on the model axis do not divide: "
                f"choose a mesh DxM whose M divides {heads}."
            )


def create(architecture: Architecture, config: PolicyConfig, seed: int) -> Qwen25VL:
    """A model with random weights."""
    return Qwen25VL(architecture, config, rngs=nnx.Rngs(params=seed))


def abstract(architecture: Architecture, config: PolicyConfig) -> Qwen25VL:
    """The model with shapes in the place of arrays: what loading and ahead-of-time compilation start from."""
    return nnx.eval_shape(lambda: create(architecture, config, 0))
