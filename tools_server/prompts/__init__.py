"""The words with which the LLM is asked, each in a text file of its own, and what is made of its replies."""

import re
from pathlib import Path
from string import Template

from vstar_jax.tools.protocol import clean

FOLDER = Path(__file__).parent


def load(name: str) -> Template:
    """The prompt in `name`.txt, with places such as $label."""
    return Template((FOLDER / f"{name}.txt").read_text().strip())


def sentences(reply: str, most: int, chars: int) -> str:
    """The first sentences of a reply on one line: at most `most`, as many as fit in `chars` whole; "" when none does."""
    flat = " ".join(clean(reply).split())
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", flat)[:most]:
        longer = f"{kept} {sentence}".strip()
        if len(longer) > chars:
            break
        kept = longer
    return kept
