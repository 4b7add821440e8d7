"""How many operations a model's work is, and what share of the device's matrix rate it reaches (MFU).

Counted are the products of matrices of the decoder, the vocabulary projection and the vision tower, attention included, two
operations for each product of two numbers; of causal attention only the pairs of a query and a key that it sees. A backward
pass counts twice its forward pass. What a program computes again, or computes and hides, does not count.
"""

import numpy as np

from vstar_jax.batch import MERGE, PATCH_VALUES
from vstar_jax.benchmark.size import Size
from vstar_jax.data.patches import Grid, window_order
from vstar_jax.models.config import TextArchitecture, VisionArchitecture

TRAINING = 3
"""Forward and backward, in forward passes."""


def seen(length: int, before: int = 0) -> int:
    """Pairs of a query and a key of `length` causal queries after `before` keys."""
    return length * before + length * (length + 1) // 2


def text_operations(text: TextArchitecture, tokens: int, pairs: int, predicted: int) -> float:
    """A forward pass of the decoder over `tokens` with `pairs` of a query and a key, and logits for `predicted` of them."""
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    weights = text.hidden * (2 * heads + 2 * kv_heads + 3 * text.intermediate)  # q and o, k and v, SwiGLU
    scores = 2 * heads  # of a pair: the score, and the weighted value
    return 2.0 * (text.layers * (tokens * weights + pairs * scores) + predicted * text.hidden * text.vocab)


def clip_operations(vision: VisionArchitecture, grid: Grid) -> float:
    """A forward pass of the vision tower over a clip: attention in windows, and in whole frames in a few layers."""
    patches, layout, full = int(np.prod(grid)), window_order(grid), len(vision.full_attention_layers)
    pairs = full * _pairs(layout.frame_id) + (vision.layers - full) * _pairs(layout.window_id)
    weights = vision.layers * vision.hidden * (4 * vision.hidden + 3 * vision.intermediate)  # qkv and proj, SwiGLU
    merged = MERGE * vision.hidden
    ends = PATCH_VALUES * vision.hidden + merged * (merged + vision.out_hidden) / MERGE  # patch embedding and merger
    return 2.0 * (patches * (weights + ends) + 2 * vision.hidden * pairs)


def _pairs(groups: np.ndarray) -> int:
    return int((np.bincount(groups).astype(np.int64) ** 2).sum())


def row_operations(size: Size, clips: int, tokens: int, learned: int) -> float:
    """A forward pass over one row with the logits of the tokens that are learned, as in training."""
    architecture = size.architecture
    text = text_operations(architecture.text, tokens, seen(tokens), learned)
    return clips * clip_operations(architecture.vision, size.grid) + text


def rollout_operations(size: Size, clips: int, prompts: int, prompt: int, group: int, written: int) -> float:
    """Encoding and prefill of each prompt of `prompt` tokens once, and `written` tokens of `group` replies to each."""
    text, tower = size.architecture.text, size.architecture.vision
    ahead = clips * clip_operations(tower, size.grid) + text_operations(text, prompt, seen(prompt), 1)
    return prompts * (ahead + group * text_operations(text, written, seen(written, prompt), written))
