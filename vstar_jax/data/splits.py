"""The rules of the protocols: base and novel classes by training frequency, few-shot draws, and the means of results.

The rules are those of ViFi-CLIP as OVAR.md states them; `protocols` says which lists they apply to.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vstar_jax.data.clips import ClipRecord, canonical, label_key
from vstar_jax.errors import UserError

SHOTS = 16
SEEDS = (1, 2, 3)
STD = "sample standard deviation (n - 1)"
"""Which spread `Spread.std` is; the papers do not say theirs."""


@dataclass(frozen=True)
class ClassSplit:
    """Labels of the base and of the novel classes, each in ascending order of frequency."""

    base: tuple[str, ...]
    novel: tuple[str, ...]


def by_frequency(train: Iterable[ClipRecord]) -> ClassSplit:
    """Base and novel classes from the training clips of a whole dataset: the rarer half is novel, the rest is base.

    Of an odd number of classes the base gets one more; classes of one frequency go by their names. HMDB-51 has 70 training
    clips of every class, so its cut is alphabetical. A class is known by its `label_key` and spelled as it first occurs.
    """
    spelling: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for clip in train:
        spelling.setdefault(label_key(clip.label), clip.label)
        counts[label_key(clip.label)] += 1
    order = sorted(counts, key=lambda key: (counts[key], spelling[key].casefold().replace("_", " ")))
    labels = tuple(spelling[key] for key in order)
    cut = len(labels) // 2
    return ClassSplit(base=labels[cut:], novel=labels[:cut])


def of_classes(clips: Iterable[ClipRecord], labels: Iterable[str]) -> tuple[ClipRecord, ...]:
    """The clips of these classes, in their order."""
    keys = {label_key(label) for label in labels}
    return tuple(clip for clip in clips if label_key(clip.label) in keys)


def few_shot(train: Iterable[ClipRecord], shots: int = SHOTS, seed: int = 1) -> tuple[ClipRecord, ...]:
    """`shots` clips of every class, drawn anew for each seed, for users who have not the published draws.

    A class's draw depends on the seed and its own clips, not on their order or on other classes. UserError when a class has
    fewer clips.
    """
    classes: dict[str, list[ClipRecord]] = {}
    for clip in train:
        classes.setdefault(label_key(clip.label), []).append(clip)
    drawn: list[ClipRecord] = []
    for key in sorted(classes):
        clips = sorted(classes[key], key=lambda clip: (canonical(clip.path).stem, clip.path))
        if len(clips) < shots:
            raise UserError(f"the class {clips[0].label} has {len(clips)} training clips: {shots} shots need as many.")
        rng = np.random.default_rng((seed, *key.encode()))
        drawn += [clips[i] for i in sorted(rng.permutation(len(clips))[:shots])]
    return tuple(drawn)


def harmonic_mean(base: float, novel: float) -> float:
    """2BN / (B + N) of accuracies that have not been rounded; 0 when both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a result over seeds or splits; std is None for a single value."""

    mean: float
    std: float | None

    def text(self, scale: float = 100.0, digits: int = 1) -> str:
        """As in the tables, such as 48.2 ± 1.5."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {scale * self.std:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and `STD` of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def base_to_novel(seeds: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Base, novel and harmonic mean of (base, novel) accuracies of one or several seeds: the HM of the unrounded means."""
    base, novel = (statistics.fmean(values) for values in zip(*seeds, strict=True))
    return base, novel, harmonic_mean(base, novel)
