"""M-RoPE positions of a token sequence; numpy only.

Follows `get_rope_index` of transformers 4.49 to 4.51, with which the released weights were trained; later releases differ.
`chat` calls it for dialogues and continuations.
"""

from collections.abc import Sequence

import numpy as np

from vstar_jax.data.patches import Grid


def positions(
    tokens: np.ndarray,
    grids: Sequence[Grid],
    second_per_grid: Sequence[float],
    tokens_per_second: float,
    image_pad: int,
    video_pad: int,
    merge: int = 2,
) -> np.ndarray:
    """Positions int32 [S, 3] (time, height, width) of tokens int [S].

    grids: (t, h, w) in patches of the images and clips in order of appearance; second_per_grid: for each of them the seconds
    that one temporal patch lasts, which images ignore. A temporal patch stands at floor(t * seconds * tokens_per_second),
    and the text after a clip starts one after the largest position before it. ValueError when the pads in `tokens` are not
    those of the grids.
    """
    tokens = np.asarray(tokens)
    is_pad = (tokens == image_pad) | (tokens == video_pad)
    sizes = [t * h * w // merge**2 for t, h, w in grids]
    if is_pad.sum() != sum(sizes):
        raise ValueError(
            f"{is_pad.sum()} visual tokens stand in the text, but the pictures have {sum(sizes)}: give each its own."
        )
    pieces: list[np.ndarray] = []
    at = start = 0
    for (t, h, w), seconds, size in zip(grids, second_per_grid, sizes, strict=True):
        begin = at + int(np.argmax(is_pad[at:]))
        kinds = np.unique(tokens[begin : begin + size])
        if len(kinds) != 1:
            raise ValueError(f"a picture of {size} visual tokens does not stand in one piece: place its pads side by side.")
        pieces.append(_text(start, begin - at))
        start += begin - at
        scale = np.float32(seconds if kinds[0] == video_pad else 0)
        # float32 and in this order, as torch computes it: the floor of a product is sensitive to both.
        times = (np.arange(t, dtype=np.float32) * scale * np.float32(tokens_per_second)).astype(np.int64)
        where = np.indices((t, h // merge, w // merge)).reshape(3, -1).T
        pieces.append(start + np.stack([times[where[:, 0]], where[:, 1], where[:, 2]], -1))
        start = int(pieces[-1].max()) + 1
        at = begin + size
    pieces.append(_text(start, len(tokens) - at))
    return np.concatenate(pieces).astype(np.int32)


def _text(start: int, length: int) -> np.ndarray:
    return np.repeat(start + np.arange(length)[:, None], 3, axis=1)
