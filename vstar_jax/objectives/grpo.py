"""The GRPO objective (paper, Eq. 3-5): advantages inside groups, a clipped ratio and a divergence from the reference.

The rollout gives tokens, the policy mask and the log-probabilities that it sampled with, `rewards` the rewards; the trainer
sums `Totals` over micro-batches and divides once. Tokens that the policy did not sample never reach a loss.
"""

from dataclasses import dataclass, fields
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vstar_jax.batch import Batch
from vstar_jax.config import GrpoConfig
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.logits import per_token

STD_EPSILON = 1e-4
KL_CLAMP = 10.0
"""Bound of the log-ratio in k3, as in the released code: its exponential stays finite."""
RATIO_CLAMP = 20.0
"""Bound of the logarithm of the importance ratio, far outside any clip range: a collapsed token makes no infinity."""
SAME_REWARD = 1e-6
"""Rewards this close are equal but for rounding: dividing by their deviation would only amplify it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Totals:
    """Sums over policy tokens, float32 scalars: divide once, after micro-batches and devices are summed.

    loss is to be divided by count, which is what `aggregate` averages over, all others by tokens. clipped: how many had a
    ratio that the clip range cut off; kl: the divergence from the reference; ratio: the importance ratio; sampler_kl: the
    divergence of the policy that sampled from this one, before the first update the error of the sampler's or the trainer's
    arithmetic alone; entropy: minus the log-probability of what was sampled, on average the entropy of the policy as long as
    it is the one that sampled.
    """

    loss: jax.Array
    count: jax.Array
    tokens: jax.Array
    clipped: jax.Array
    kl: jax.Array
    ratio: jax.Array
    sampler_kl: jax.Array
    entropy: jax.Array

    @classmethod
    def zero(cls) -> "Totals":
        """The totals of nothing: what a sum over micro-batches starts from."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in fields(cls)))


def advantages(rewards: np.ndarray, normalise: Literal["std", "none"]) -> tuple[np.ndarray, np.ndarray]:
    """A = R - mean(R) of each group, divided by std(R) + 1e-4 unless `normalise` is "none" (Eq. 5; Dr. GRPO).

    rewards [N, G], on the host. Returns advantages float32 [N, G] and bool [N], the groups whose rewards differ: the others
    teach nothing. The deviation is the sample's (divided by G - 1), as in the released code.
    """
    rewards = np.asarray(rewards, np.float64)
    differs = np.ptp(rewards, axis=1) > SAME_REWARD
    centred = np.where(differs[:, None], rewards - rewards.mean(axis=1, keepdims=True), 0.0)
    if normalise == "std":
        centred /= rewards.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON
    return centred.astype(np.float32), differs


def token_log_probs(model: Qwen25VL, batch: Batch, *, chunk: int, temperature: float = 1.0, packed: bool = False) -> jax.Array:
    """log p(token | what stands before it) at the sampling temperature, float32 [B, S]; 0 outside `batch.loss_mask`.

    Logits exist for `chunk` tokens of each row at a time, also in the backward pass.
    """

    def log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
        logits = logits / temperature
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1)

    targets = jnp.roll(batch.tokens, -1, axis=1)
    mask = jnp.roll(batch.loss_mask, -1, axis=1).at[:, -1].set(False)
    return jnp.roll(per_token(model.text, model.hidden(batch, packed=packed), targets, mask, log_prob, chunk), 1, axis=1)


def divergence(log_probs: jax.Array, other: jax.Array, estimator: Literal["k1", "k2", "k3"]) -> jax.Array:
    """Estimates KL(policy || other) at tokens that the policy sampled, from the log-probabilities of both (Schulman, 2020).

    With D = other - policy: k1 is -D, k2 is D^2 / 2, k3 is exp(D) - D - 1 with D held inside +-10 (Eq. 4).
    """
    delta = other - log_probs
    if estimator == "k1":
        return -delta
    if estimator == "k2":
        return delta * delta / 2
    delta = jnp.clip(delta, -KL_CLAMP, KL_CLAMP)
    return jnp.expm1(delta) - delta


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    policy_mask: jax.Array,
    config: GrpoConfig,
    limit: int,
) -> Totals:
    """The negated objective of Eq. 3 over a micro-batch of episodes, one a row, as exact sums.

    Args:
        log_probs: float [B, S], the policy's, from `token_log_probs`.
        old_log_probs: float [B, S], of the policy that sampled, at the same temperature; without a gradient.
        ref_log_probs: float [B, S], of the reference; None when beta is 0.
        advantages: float [B].
        policy_mask: bool [B, S], true where the policy sampled the token. Rows of padding alone count nothing.
        config: clip range, beta, estimator and aggregation.
        limit: the most tokens that the policy may sample in an episode, the length that "constant" divides by (Dr. GRPO).
    """
    # Masked before any exponential: where() after it would still send NaN backwards from what it leaves out.
    log_probs, old_log_probs = (jnp.where(policy_mask, x, 0.0) for x in (log_probs, jax.lax.stop_gradient(old_log_probs)))
    ratio = jnp.exp(jnp.clip(log_probs - old_log_probs, -RATIO_CLAMP, RATIO_CLAMP))
    advantage = advantages[:, None]
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage)
    kl = jnp.zeros_like(loss)
    if ref_log_probs is not None:
        kl = divergence(log_probs, jnp.where(policy_mask, jax.lax.stop_gradient(ref_log_probs), 0.0), config.kl)
        loss += config.beta * kl

    def total(x: jax.Array) -> jax.Array:
        return jnp.where(policy_mask, x, 0.0).sum()

    lengths = policy_mask.sum(axis=1)
    rows, tokens = (lengths > 0).sum().astype(loss.dtype), lengths.sum().astype(loss.dtype)
    if config.aggregate == "sequence":
        loss, count = loss / jnp.maximum(lengths, 1)[:, None], rows
    else:
        count = tokens if config.aggregate == "token" else rows * limit
    return Totals(
        loss=total(loss),
        count=count,
        tokens=tokens,
        clipped=total(ratio * advantage > clipped * advantage),
        kl=total(kl),
        ratio=total(ratio),
        sampler_kl=total(divergence(old_log_probs, log_probs, "k3")),
        entropy=total(-log_probs),
    )
