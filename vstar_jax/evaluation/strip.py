"""An episode as a picture: frames of the clip, below them what the tools drew, and the answer as the caption."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vstar_jax.errors import UserError
from vstar_jax.evaluation.predict import Watched, verdict

COLUMNS = 8
TILE, NARROWEST = 176, 4 * 176
"""Width in pixels of a frame, and of all that stands between the margins at least."""
GAP, MARGIN, NAMES = 6, 20, 110
SMALL, NORMAL, LARGE = 13, 15, 26
PAPER, INK, FAINT, ANSWER, NO_ANSWER = "#ffffff", "#1d2330", "#6b7385", "#1f4fa3", "#a3201c"
MOST_LABELS = 24


def draw(watched: Watched) -> Image.Image:
    """The picture: at most `COLUMNS` frames, evenly spread, in one row or two, and the caption."""
    frames = watched.clip.frames
    picked = np.unique(np.round(np.linspace(0, len(frames) - 1, COLUMNS)).astype(int))
    height = round(TILE * frames.shape[1] / frames.shape[2])
    width = 2 * MARGIN + max(len(picked) * (TILE + GAP) - GAP, NARROWEST)
    rows = {"clip": frames} | ({} if watched.drawn is None else {"with what the tools drew": watched.drawn})
    texts = {name: _wrapped(text, width - 2 * MARGIN - NAMES, _of(name)) for name, text in _caption(watched).items()}
    written = sum(len(lines) * _height(_of(name)) for name, lines in texts.items())
    line = _height(_font(SMALL))
    sheet = Image.new("RGB", (width, 2 * MARGIN + len(rows) * (line + height + GAP) + 2 * line + written), PAPER)
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for name, pictures in rows.items():
        pen.text((MARGIN, top), name, FAINT, _font(SMALL))
        top += line
        for column, index in enumerate(picked):
            tile = Image.fromarray(pictures[index]).resize((TILE, height), Image.Resampling.BICUBIC)
            sheet.paste(tile, (MARGIN + column * (TILE + GAP), top))
        top += height + GAP
    for column, index in enumerate(picked):
        pen.text((MARGIN + column * (TILE + GAP), top - GAP // 2), f"{index / watched.clip.fps:.1f} s", FAINT, _font(SMALL))
    top += 2 * line
    for name, lines in texts.items():
        font = _of(name)
        pen.text((MARGIN, top + font.size), name, FAINT, _font(SMALL), anchor="ls")
        for text in lines:
            colour = INK if name != "answer" else ANSWER if watched.label else NO_ANSWER
            pen.text((MARGIN + NAMES, top + font.size), text, colour, font, anchor="ls")
            top += _height(font)
    return sheet


def save(watched: Watched, path: Path) -> None:
    """Writes the picture as PNG; UserError when it cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(watched).save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another path for the picture.") from None


def _caption(watched: Watched) -> dict[str, str]:
    """What is said below the frames, by its name; nothing of what the policy did not write."""
    reply, more = watched.played.reply, len(watched.labels) - MOST_LABELS
    scored = (name if score is None else f"{name} {score:g}" for name, score, _ in watched.candidates())
    named = [*watched.labels[:MOST_LABELS], *([f"and {more} more"] if more > 0 else [])]
    told = {
        "answer": verdict(watched),
        "sub-motions": ", then ".join(reply.sub_motions),
        "candidates": ", ".join(scored),
        "tools": ", ".join(f"{tool} {status}" for tool, status in watched.played.statuses.items()) or "none asked for",
        "labels": ", ".join(named),
    }
    return {name: text for name, text in told.items() if text}


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines that fit `width` pixels; a word that alone is wider is cut short."""
    lines = [""]
    for word in text.split():
        if font.getlength(longer := f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            word = f"{word[:-2]}…"
        lines = [*lines, word] if lines[-1] else [word]
    return lines


def _of(name: str) -> ImageFont.FreeTypeFont:
    """The font of a part of the caption."""
    return _font(LARGE, "DejaVuSans-Bold.ttf") if name == "answer" else _font(NORMAL)


@cache
def _font(size: int, name: str = "DejaVuSans.ttf") -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which has more alphabets than Pillow's."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.5)
