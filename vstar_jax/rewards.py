"""The hierarchical reward of an episode (paper, Eq. 6), as pure functions of what was parsed from it.

R = R_acc + R_format + 1[R_acc > 0] (R_tool + R_sub). Decisions and replies come from `dialogue`, how the tools' calls ended
from `tools`; the GRPO trainer turns the totals into advantages.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vstar_jax.config import RewardConfig
from vstar_jax.dialogue import Decision, Reply, same_label

OK = "ok"
"""How a tool's call must have ended to be paid for."""

FUNCTION_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "of",
        "on",
        "or",
        "that",
        "the",
        "then",
        "to",
        "with",
    }
)
"""Words that stand in every explanation: a sub-motion of these alone names no motion and earns nothing."""


@dataclass(frozen=True)
class Reward:
    """What an episode earned: accuracy, format and tool are 0 or 1 and sub_motion lies in 0..1.

    tool and sub_motion are 0 unless the answer is right. total sums the parts that are switched on; the others are only told,
    so that runs with other rewards can be compared.
    """

    accuracy: float
    format: float
    tool: float
    sub_motion: float
    total: float


def score(
    config: RewardConfig, decision: Decision, statuses: Mapping[str, str], reply: Reply, label: str, explanation: str | None
) -> Reward:
    """The reward of an episode (Eq. 6).

    Args:
        config: the parts and their variants.
        decision: which tools were asked for.
        statuses: how their calls ended, tool name -> "ok" or a failure; a tool that is missing was not called.
        reply: the last turn.
        label: the right answer.
        explanation: the right action's explanation, without its name; None when there is none.
    """
    right = reply.answer is not None and same_label(reply.answer, label)
    reference = explanation if config.reference == "explanation" else own_comparison(reply)
    used = any(statuses.get(name) == OK for name in decision.chosen())
    parts = {
        "accuracy": float(right),
        "format": float(reply.well_formed),
        "tool": float(right and used),
        "sub_motion": sub_motion_reward(reply.sub_motions, reference or "", config) if right else 0.0,
    }
    return Reward(**parts, total=sum(value for name, value in parts.items() if getattr(config, name)))


def own_comparison(reply: Reply) -> str:
    """What the policy itself wrote of the candidate that it answers with; the released code's reference."""
    found = (text for name, text in reply.comparisons.items() if same_label(name, reply.answer or ""))
    return next(found, "")


def sub_motion_reward(sub_motions: Sequence[str], reference: str, config: RewardConfig) -> float:
    """R_sub in 0..1: the summed weights of the sub-motions, in rank order, that occur in `reference`."""
    distinct = list(dict.fromkeys(words for name in sub_motions if (words := _words(name))))
    weights = sub_motion_weights(len(distinct), config)
    return min(sum(w for w, words in zip(weights, distinct, strict=True) if _occurs(words, _words(reference))), 1.0)


def sub_motion_weights(count: int, config: RewardConfig) -> tuple[float, ...]:
    """Weights of ranks 1..count with sum 1: proportional to 2^-i, to count - i + 1, or equal."""
    ranks = range(1, count + 1)
    raw = {
        "exponential": [2.0**-i for i in ranks],
        "linear": [float(count - i + 1) for i in ranks],
        "uniform": [1.0 for _ in ranks],
    }[config.weights]
    return tuple(weight / sum(raw) for weight in raw)


def temporal_bonus(ordered: Sequence[Reward], shuffled: Sequence[Reward], config: RewardConfig) -> tuple[float, ...]:
    """The bonus of each episode of a group (released code): right answers are paid when the group is at least
    `temporal_ratio` times as accurate as `shuffled`, a group on the same clip with its frames shuffled.
    """
    mean, mean_shuffled = (sum(r.accuracy for r in group) / len(group) for group in (ordered, shuffled))
    return tuple(config.temporal * (r.accuracy > 0 and mean >= config.temporal_ratio * mean_shuffled) for r in ordered)


def length_bonus(reward: Reward, tokens: int, config: RewardConfig) -> float:
    """The bonus of a right answer whose last turn has `length_min` to `length_max` tokens (released code)."""
    return config.length * (reward.accuracy > 0 and config.length_min <= tokens <= config.length_max)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower().replace("_", " ")))


def _occurs(words: tuple[str, ...], reference: tuple[str, ...]) -> bool:
    """Whether `words` stand in `reference` side by side, as whole words."""
    places = range(len(reference) - len(words) + 1)
    return not FUNCTION_WORDS.issuperset(words) and any(reference[i : i + len(words)] == words for i in places)
