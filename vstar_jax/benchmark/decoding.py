"""How many bytes decoding must move: what the share of the memory's bandwidth that it reaches is counted from.

For every token that all rows write, the weights of the decoder and of the vocabulary projection are read once, and so are the
keys and values: a prompt's once for its group, a row's own as far as they are written, and the new ones are written.
"""

import numpy as np

from vstar_jax.models.config import TextArchitecture


def weight_bytes(text: TextArchitecture, width: int) -> int:
    """Weights that a token needs, at `width` bytes each: the layers' matrices, biases and norms, and the projection."""
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    matrices = text.hidden * (2 * heads + 2 * kv_heads + 3 * text.intermediate)
    rest = heads + 2 * kv_heads + 2 * text.hidden
    return width * (text.layers * (matrices + rest) + text.hidden * (text.vocab + 1))


def cache_bytes(text: TextArchitecture, slots: float, width: int) -> float:
    """Keys and values of `slots` tokens in all layers, at `width` bytes a number."""
    return 2 * text.layers * text.kv_heads * text.head_dim * slots * width


def decode_bytes(text: TextArchitecture, prompts: int, prompt: int, group: int, written: int, width: int) -> float:
    """Bytes that `written` tokens of `group` replies to each of `prompts` of `prompt` tokens move, all rows at once."""
    rows = prompts * group
    read = np.arange(1, written + 1).sum() * rows + written * prompts * prompt
    return written * weight_bytes(text, width) + cache_bytes(text, float(read + written * rows), width)
