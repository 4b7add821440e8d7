"""The guard against evaluating on what was trained on: compares clips, by path and by content, and classes.

Training and evaluation call `guard` on their task, before any work; scripts/check_leakage.py compares lists.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vstar_jax.data.clips import Canonical, ClipRecord, canonical, label_key
from vstar_jax.errors import UserError

if TYPE_CHECKING:
    from vstar_jax.config import Config
    from vstar_jax.data.task import Task

EXAMPLES = 3
NOVEL = "novel"
"""The group in which a trained class is a leak too."""


@dataclass(frozen=True)
class Report:
    """What two sets of clips have in common.

    train_clips, train_classes, eval_clips, eval_classes: what was compared, classes empty where a list does not name them;
    same_path, same_content: evaluated clips that were trained on, by canonical path and by content hash; hashed: evaluated
    clips with a hash, for without one there is nothing to compare; shared_classes: trained and evaluated classes;
    train_clips_of_shared: training clips of those.
    """

    train_clips: int
    train_classes: tuple[str, ...]
    eval_clips: int
    eval_classes: tuple[str, ...]
    same_path: tuple[ClipRecord, ...]
    same_content: tuple[ClipRecord, ...]
    hashed: int
    shared_classes: tuple[str, ...]
    train_clips_of_shared: int

    @property
    def shared_clips(self) -> tuple[ClipRecord, ...]:
        """Evaluated clips that were trained on, by path or content, each once."""
        return tuple(dict.fromkeys((*self.same_path, *self.same_content)))

    def leaks(self, *, classes: bool = True) -> bool:
        """Whether anything is shared; classes: whether a shared class counts, as it does for novel ones."""
        return bool(self.shared_clips) or (classes and bool(self.shared_classes))

    def text(self) -> str:
        """The report in sentences, with counts and examples."""
        lines = [
            f"trained on {self.train_clips:,} clips of {len(self.train_classes)} classes, "
            f"evaluated on {self.eval_clips:,} of {len(self.eval_classes)}",
            f"shared clips: {len(self.same_path):,} by path, {len(self.same_content):,} by content"
            + (f" ({self.hashed:,} have a hash)" if self.hashed < self.eval_clips else "")
            + _examples([clip.path for clip in self.shared_clips]),
            f"shared classes: {len(self.shared_classes)}, with {self.train_clips_of_shared:,} training clips"
            + _examples(self.shared_classes),
        ]
        if not self.train_classes or not self.eval_classes:
            lines[-1] = "shared classes: unknown, for a list numbers its classes and no file names them"
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """The counts alone, for result.json."""
        return {
            "train_clips": self.train_clips,
            "eval_clips": self.eval_clips,
            "shared_clips": len(self.shared_clips),
            "shared_clips_by_path": len(self.same_path),
            "shared_clips_by_content": len(self.same_content),
            "shared_classes": len(self.shared_classes),
            "train_clips_of_shared_classes": self.train_clips_of_shared,
        }


def _examples(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f", such as {', '.join(names[:EXAMPLES])}"


def check(train: Sequence[ClipRecord], evaluated: Sequence[ClipRecord]) -> Report:
    """Compares what was trained on with what is evaluated.

    Paths are compared without suffixes and layout (`clips.canonical`), classes without spelling (`clips.label_key`); content
    only among clips that carry a digest. An evaluated clip counts once, however often the training has it.
    """
    train_counts = Counter(label_key(clip.label) for clip in train if clip.label)
    eval_spelling: dict[str, str] = {}
    for clip in evaluated:
        if clip.label:
            eval_spelling.setdefault(label_key(clip.label), clip.label)
    classes = {*train_counts, *eval_spelling}
    trained: dict[str, set[Canonical]] = defaultdict(set)
    for clip in train:
        key = canonical(clip.path, classes)
        trained[key.stem].add(key)
    digests = {clip.digest for clip in train if clip.digest}
    evaluated = list(dict.fromkeys(evaluated))
    shared = tuple(spelled for key, spelled in eval_spelling.items() if key in train_counts)
    return Report(
        train_clips=len(train),
        train_classes=tuple(train_counts),
        eval_clips=len(evaluated),
        eval_classes=tuple(eval_spelling.values()),
        same_path=tuple(c for c in evaluated if _among(canonical(c.path, classes), trained)),
        same_content=tuple(clip for clip in evaluated if clip.digest and clip.digest in digests),
        hashed=sum(bool(clip.digest) for clip in evaluated),
        shared_classes=shared,
        train_clips_of_shared=sum(train_counts[label_key(label)] for label in shared),
    )


def _among(key: Canonical, trained: dict[str, set[Canonical]]) -> bool:
    return any(key.same(other) for other in trained.get(key.stem, ()))


def refuse(report: Report, name: str, *, classes: bool, allowed: bool, option: str) -> None:
    """Raises UserError with counts and examples when `report` leaks and that is not `allowed`.

    name: what is evaluated, for the message; classes: whether a shared class is a leak, as for novel classes; option: the
    setting that allows it.
    """
    if report.leaks(classes=classes) and not allowed:
        raise UserError(
            f"the training list holds {_shared(report, name, classes)}: train without them, or set {option} to measure all the "
            "same, which the results then say."
        )


def _shared(report: Report, name: str, classes: bool) -> str:
    """What leaks, with counts and examples."""
    found = []
    if clips := report.shared_clips:
        found.append(f"{len(clips):,} of the {report.eval_clips:,} clips of {name}{_examples([c.path for c in clips])}")
    if classes and report.shared_classes:
        found.append(
            f"{len(report.shared_classes)} of {'its' if clips else 'the'} {len(report.eval_classes)} classes "
            f"{'' if clips else f'of {name} '}"
            f"({report.train_clips_of_shared:,} training clips{_examples(report.shared_classes)})"
        )
    return " and ".join(found)


def guard(task: "Task", config: "Config") -> dict[str, Any]:
    """Compares what `task` trains on with each group that it evaluates; UserError when they share what they must not.

    Returns the counts of every group, and notes for the reader of the results: what leaks and was allowed
    (`data.allow_leakage`), or that the training clips are not known. Empty where nothing can leak.
    """
    trained, option = task.train_clips(), "data.allow_leakage=true"
    result: dict[str, Any] = {"groups": {}, "notes": []}
    for group in task.groups:
        if not (evaluated := task.test_clips(group)):
            continue
        name, classes = f"{config.data.dataset} {group}", group == NOVEL
        report = check(trained, evaluated)
        refuse(report, name, classes=classes, allowed=config.data.allow_leakage, option=option)
        result["groups"][group] = report.summary()
        if report.leaks(classes=classes):
            result["notes"].append(f"measured although it was trained on {_shared(report, name, classes)}")
    if not result["groups"]:
        return {}
    if not trained:
        result["notes"].append("no clips were compared: what it was trained on is not known (data.train)")
    return result
