"""What an assessment kept, what it dropped and why, for people (Markdown) and for programs (JSON)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vstar_jax.data.assessment import RULES, Item, Rules, Verdict, assess
from vstar_jax.synthesis.records import Judgement

EXAMPLES = 3
"""Dropped dialogues that the table of a reason names."""


def assess_all(items: Sequence[Item], judgements: Mapping[str, Judgement], rules: Rules) -> list[Verdict]:
    """Rules and, where there is one, the judge."""
    verdicts = []
    for item in items:
        verdict = assess(item, rules)
        said = judgements.get(item.path)
        if verdict.kept and said and not said.keep:
            verdict = Verdict(item.path, item.label, {"judge": " ".join(said.reasons)})
        verdicts.append(verdict)
    return verdicts


def summarise(verdicts: Sequence[Verdict], judgements: Mapping[str, Judgement]) -> dict[str, Any]:
    """Counts by reason and by label, every dropped dialogue with its reasons, and the mean of the judge's scores."""
    reasons = Counter(rule for verdict in verdicts for rule in verdict.problems)
    labels: dict[str, dict[str, int]] = {}
    for verdict in verdicts:
        counts = labels.setdefault(verdict.label, {"kept": 0, "dropped": 0})
        counts["kept" if verdict.kept else "dropped"] += 1
    scores: dict[str, list[float]] = {}
    for judgement in judgements.values():
        for name, score in judgement.scores.items():
            scores.setdefault(name, []).append(score)
    return {
        "dialogues": len(verdicts),
        "kept": sum(verdict.kept for verdict in verdicts),
        "dropped": sum(not verdict.kept for verdict in verdicts),
        "judged": len(judgements),
        "reasons": {name: reasons[name] for name in (*RULES, "judge") if reasons[name]},
        "scores": {name: sum(given) / len(given) for name, given in sorted(scores.items())},
        "labels": dict(sorted(labels.items())),
        "why": {verdict.path: dict(verdict.problems) for verdict in verdicts if not verdict.kept},
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page."""
    total = max(summary["dialogues"], 1)
    lines = [
        "# Assessment of synthetic dialogues",
        "",
        f"{summary['dialogues']} dialogues: {summary['kept']} kept ({summary['kept'] / total:.1%}), {summary['dropped']} "
        f"dropped; {summary['judged']} were judged by a model.",
        "",
        "| reason | dropped | examples |",
        "|---|---:|---|",
    ]
    for reason, count in summary["reasons"].items():
        examples = [f"`{path}`: {why[reason]}" for path, why in summary["why"].items() if reason in why][:EXAMPLES]
        lines.append(f"| {reason} | {count} | {_cell(' '.join(examples))} |")
    if summary["scores"]:
        lines += ["", "| the judge's score | mean |", "|---|---:|"]
        lines += [f"| {name} | {score:.2f} |" for name, score in summary["scores"].items()]
    lines += ["", "| label | kept | dropped |", "|---|---:|---:|"]
    lines += [f"| {_cell(label)} | {counts['kept']} | {counts['dropped']} |" for label, counts in summary["labels"].items()]
    return "\n".join(lines) + "\n"


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    """report.md and report.json."""
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
