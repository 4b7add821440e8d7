"""The invented names of StickMotion's actions: two syllables, each a consonant and a vowel.

A name belongs to one action, so that one glossary explains them all. Each action has names for training and others for
evaluation: the explanation in the prompt is the only link from an unseen name to what is seen.
"""

import itertools
from typing import Literal

import numpy as np

from vstar_jax.data.stick_motion.motions import ACTIONS, Action, explanation

Pool = Literal["train", "eval"]

NAME_SEED = 2027
TRAIN_NAMES, EVAL_NAMES = 12, 5  # per action
SYLLABLES: tuple[str, ...] = tuple(c + v for c, v in itertools.product("bdklmnrtvz", "aiou"))
# Words of English or of our prompts, and words that nobody should read in a demonstration.
AVOIDED = frozenset(["data", "dodo", "kilo", "lava", "limo", "lulu", "mama", "nazi", "titi", "tuna", "zulu"])
VERDICT = "no"  # a name that began with it would begin with the token of a verdict


def all_names() -> tuple[str, ...]:
    """Every two-syllable name that may be used, in a fixed order."""
    every = map("".join, itertools.product(SYLLABLES, repeat=2))
    return tuple(n for n in every if n not in AVOIDED and not n.startswith(VERDICT))


def _share_out() -> dict[Pool, tuple[tuple[str, ...], ...]]:
    names = np.random.default_rng(NAME_SEED).permutation(all_names())[: len(ACTIONS) * (TRAIN_NAMES + EVAL_NAMES)]
    rows = names.reshape(len(ACTIONS), TRAIN_NAMES + EVAL_NAMES).tolist()
    return {"train": tuple(tuple(r[:TRAIN_NAMES]) for r in rows), "eval": tuple(tuple(r[TRAIN_NAMES:]) for r in rows)}


_NAMES = _share_out()


def names(action: Action, pool: Pool) -> tuple[str, ...]:
    """The names of an action in a pool."""
    return _NAMES[pool][action.number]


def pool_names(pool: Pool) -> frozenset[str]:
    """All names of a pool."""
    return frozenset(itertools.chain.from_iterable(_NAMES[pool]))


def defined(action: Action, name: str) -> str:
    """The explanation of a name, such as "raise left arm then squat = bako".

    It ends with the name, so that a small model which repeats the moves finds the name by what stood after them before:
    looking back from moves to a name ahead of them is what it learns last.
    """
    return f"{explanation(action.sub_motions)} = {name}"


def glossary() -> dict[str, str]:
    """Name -> explanation, for every name of every action."""
    pools: tuple[Pool, ...] = ("train", "eval")
    return {name: defined(action, name) for action in ACTIONS for pool in pools for name in names(action, pool)}
