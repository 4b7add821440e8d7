"""GRPO (Eq. 3-5): advantages, log-probabilities and the loss against NumPy, differences and each other's sums."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import dialogues as d
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vstar_jax.batch import Batch, Example, collate
from vstar_jax.config import GrpoConfig, PolicyConfig, parse
from vstar_jax.models.qwen2_5_vl import Qwen25VL, create
from vstar_jax.objectives.grpo import Totals, advantages, divergence, grpo_loss, token_log_probs
from vstar_jax.sharding import put_batch, state_shardings

EXACT = 1e-12  # relative, float64 against float64: the same formula in another order
TOLERANCE = 1e-6  # relative, float32 against a float64 reference
DIFFERENCE = 1e-6  # relative, float64 central differences with a step of 1e-6
MODEL_TOLERANCE = 1e-5  # relative, float32 through the whole model: the same terms in another order

ROWS, LENGTH, LIMIT = 6, 7, 20
AGGREGATES = ("sequence", "token", "constant")
ESTIMATORS = ("k1", "k2", "k3")


@pytest.fixture(scope="module")
def episodes() -> dict[str, np.ndarray]:
    """Episodes of two turns, one of them empty, whose ratios lie on both sides of the clip range; float64."""
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.0, (ROWS, LENGTH))
    mask = rng.random((ROWS, LENGTH)) < 0.6
    mask[2] = False
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + rng.normal(0, 0.4, log_probs.shape),
        "ref_log_probs": log_probs + rng.normal(0, 0.5, log_probs.shape),
        "advantages": np.array([1.3, -0.7, 0.9, -1.1, 0.2, -0.4]),
        "policy_mask": mask,
    }


def reference(config: GrpoConfig, limit: int, **episodes: np.ndarray) -> dict[str, float]:
    """The loss, token by token as Eq. (3) and (4) read, in Python's float64."""
    totals = dict.fromkeys(("loss", "count", "tokens", "clipped", "kl", "ratio", "sampler_kl", "entropy"), 0.0)
    for row, advantage in enumerate(episodes["advantages"]):
        places = np.flatnonzero(episodes["policy_mask"][row])
        loss = 0.0
        for at in places:
            p, old, ref = (float(episodes[f"{name}log_probs"][row, at]) for name in ("", "old_", "ref_"))
            ratio = np.exp(p - old)
            held = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            delta = ref - p
            kl = {"k1": -delta, "k2": delta**2 / 2, "k3": np.exp(delta) - delta - 1}[config.kl]
            loss += -min(ratio * advantage, held * advantage) + config.beta * kl
            totals["clipped"] += (ratio > held and advantage > 0) or (ratio < held and advantage < 0)
            totals["kl"] += kl
            totals["ratio"] += ratio
            totals["sampler_kl"] += ratio - (p - old) - 1
            totals["entropy"] -= p
        totals["tokens"] += len(places)
        totals["loss"] += loss / max(len(places), 1) if config.aggregate == "sequence" else loss
        totals["count"] += {"sequence": len(places) > 0, "token": len(places), "constant": limit * (len(places) > 0)}[
            config.aggregate
        ]
    return totals


CONFIGS = [
    GrpoConfig(aggregate=aggregate, kl=kl, clip_low=low, clip_high=high, beta=0.3)  # type: ignore[arg-type]
    for aggregate, kl, (low, high) in product(AGGREGATES, ESTIMATORS, [(0.2, 0.2), (0.1, 0.4)])
]


def name_of(config: GrpoConfig) -> str:
    return f"{config.aggregate}-{config.kl}-{config.clip_high}"


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_the_loss_is_the_papers_in_float64_and_in_float32(config, episodes):
    expected = reference(config, LIMIT, **episodes)
    single = {name: x if x.dtype == bool else x.astype(np.float32) for name, x in episodes.items()}
    result = vars(grpo_loss(**single, config=config, limit=LIMIT))
    with jax.enable_x64(True):
        double = vars(grpo_loss(**episodes, config=config, limit=LIMIT))
        for name, want in expected.items():
            assert float(double[name]) == pytest.approx(want, rel=EXACT, abs=EXACT), name
    exact = reference(config, LIMIT, **single)
    for name, want in exact.items():
        assert float(result[name]) == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE), name


def test_the_episodes_reach_both_ends_of_the_clip_range(episodes):
    """Else the test above would hold of a loss that does not clip, or at one end."""
    ratio = np.exp(episodes["log_probs"] - episodes["old_log_probs"])
    signed = np.where(episodes["policy_mask"], np.sign(episodes["advantages"])[:, None], 0)
    assert ((ratio > 1.4) & (signed > 0)).any()
    assert ((ratio < 0.8) & (signed < 0)).any()
    assert ((ratio > 1.4) & (signed < 0)).any()
    assert ((ratio < 0.8) & (signed > 0)).any()


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_differences_agree_with_the_gradient(config, episodes):
    step = 1e-6
    with jax.enable_x64(True):
        rest = {name: jnp.asarray(x) for name, x in episodes.items() if name != "log_probs"}
        loss = jax.jit(lambda log_probs: grpo_loss(log_probs, **rest, config=config, limit=LIMIT).loss)
        gradient = np.asarray(jax.grad(loss)(episodes["log_probs"]))
        measured = np.zeros_like(gradient)
        for place in np.ndindex(gradient.shape):
            shift = np.zeros_like(gradient)
            shift[place] = step
            measured[place] = (loss(episodes["log_probs"] + shift) - loss(episodes["log_probs"] - shift)) / (2 * step)
    np.testing.assert_allclose(gradient, measured, rtol=DIFFERENCE, atol=DIFFERENCE)
    assert not gradient[~episodes["policy_mask"]].any()


def test_on_policy_the_gradient_is_the_plain_policy_gradient(episodes):
    """At the first update every ratio is 1: dL/dlogp = -A / |o|, and nothing is clipped."""
    config = GrpoConfig(beta=0.0)
    mask, own = episodes["policy_mask"], episodes["log_probs"]

    def loss(log_probs: jax.Array) -> tuple[jax.Array, Totals]:
        totals = grpo_loss(log_probs, own, None, episodes["advantages"], mask, config, LIMIT)
        return totals.loss, totals

    gradient, totals = jax.grad(loss, has_aux=True)(jnp.asarray(own))
    expected = -np.where(mask, episodes["advantages"][:, None] / np.maximum(mask.sum(1), 1)[:, None], 0)
    np.testing.assert_allclose(gradient, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (totals.clipped, totals.kl, totals.sampler_kl) == (0, 0, 0)
    assert totals.ratio == totals.tokens == mask.sum()


def test_a_later_update_stops_where_the_clip_range_ends():
    """After the policy has moved past the range in the wanted direction, a token has no gradient; in the other it has."""
    old, moved = np.log([[0.2, 0.2, 0.2, 0.2]]), np.log([[0.3, 0.21, 0.1, 0.19]])
    mask, config = np.ones((1, 4), bool), GrpoConfig(beta=0.0, aggregate="token")
    for advantage, expected in [(1.0, [0, 1.05, 0.5, 0.95]), (-1.0, [1.5, 1.05, 0, 0.95])]:

        def loss(log_probs: jax.Array, advantage: float = advantage) -> jax.Array:
            return grpo_loss(log_probs, old, None, np.array([advantage]), mask, config, 4).loss

        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(moved))[0], -advantage * np.array(expected), rtol=1e-5)


def test_what_the_policy_did_not_sample_reaches_nothing(episodes):
    """Tool results and padding may hold anything, even no number at all."""
    config = GrpoConfig()
    mask = episodes["policy_mask"]
    spoilt = {n: np.where(mask, x, np.nan) if x.shape == mask.shape and x.dtype != bool else x for n, x in episodes.items()}

    def both(values: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        rest = {name: x for name, x in values.items() if name != "log_probs"}
        return jax.value_and_grad(lambda p: grpo_loss(p, **rest, config=config, limit=LIMIT).loss)(
            jnp.asarray(values["log_probs"], jnp.float32)
        )

    (loss_a, grad_a), (loss_b, grad_b) = both(episodes), both(spoilt)
    assert loss_a == loss_b
    np.testing.assert_array_equal(grad_a, grad_b)


@pytest.mark.parametrize("kl", ESTIMATORS)
def test_no_log_probability_makes_an_infinity(kl):
    extreme = np.float32([[-300.0, 0.0, -300.0, 0.0]])
    other = np.float32([[0.0, -300.0, -300.0, -300.0]])

    def loss(log_probs: jax.Array) -> jax.Array:
        ones = np.ones((1, 4), bool)
        return grpo_loss(log_probs, other, other, np.float32([-1.0]), ones, GrpoConfig(kl=kl), 4).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(extreme))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_estimators_of_the_divergence_agree_on_average():
    """Over what the policy samples, k1 and k3 give the divergence itself, and k2 nearly so while the two are near."""
    rng = np.random.default_rng(0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (rng.normal(size=8), rng.normal(size=8)))
    q = 0.9 * p + 0.1 * q
    exact = float((p * np.log(p / q)).sum())
    with jax.enable_x64(True):
        for kl, tolerance in [("k1", EXACT), ("k3", EXACT), ("k2", 0.1)]:
            estimate = (p * np.asarray(divergence(jnp.log(p), jnp.log(q), kl))).sum()  # type: ignore[arg-type]
            assert estimate == pytest.approx(exact, rel=tolerance), kl
    held = divergence(jnp.zeros(2), jnp.array([50.0, -50.0]), "k3")
    np.testing.assert_allclose(held, [np.exp(10) - 11, np.exp(-10) + 9], rtol=TOLERANCE)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_micro_batches_of_any_lengths_add_up_to_the_batch(aggregate, episodes):
    config = GrpoConfig(aggregate=aggregate)
    whole = jax.device_get(grpo_loss(**episodes, config=config, limit=LIMIT))
    parts = [
        grpo_loss(**{n: x[rows] for n, x in episodes.items()}, config=config, limit=LIMIT) for rows in ([0, 5], [1, 3, 4, 2])
    ]
    added = jax.device_get(jax.tree.map(lambda *x: sum(x), Totals.zero(), *parts))
    for name, want in vars(whole).items():
        assert getattr(added, name) == pytest.approx(want, rel=TOLERANCE), name
    if aggregate == "sequence":
        assert whole.count == ROWS - 1  # the empty row
    averaged = sum(part.loss / part.count for part in parts) / 2
    if aggregate != "constant":
        assert abs(averaged / (whole.loss / whole.count) - 1) > 100 * TOLERANCE  # what dividing early would give


def test_advantages_by_hand():
    """Rewards 0, 0, 0, 2: mean 1/2, sample deviation 1."""
    rewards = np.array([[0, 0, 0, 2], [3, 3, 3, 3]])
    normal, differs = advantages(rewards, "std")
    assert differs.tolist() == [True, False]
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal, [np.array([-0.5, -0.5, -0.5, 1.5]) / 1.0001, [0] * 4], rtol=TOLERANCE)
    plain, _ = advantages(rewards, "none")
    np.testing.assert_array_equal(plain, [[-0.5, -0.5, -0.5, 1.5], [0] * 4])


GROUPS = arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(0, 4))


@settings(max_examples=int(os.environ.get("VSTAR_FUZZ_EXAMPLES", "200")), deadline=None)
@given(GROUPS, st.floats(-2, 2), st.sampled_from(("std", "none")))
def test_advantages_of_a_group_sum_to_zero_keep_its_order_and_ignore_a_shift(rewards, shift, normalise):
    values, differs = advantages(rewards, normalise)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values.sum(axis=1), 0, atol=1e-4)
    assert not values[~differs].any()
    for reward, value in zip(rewards[differs], values[differs], strict=True):
        assert (np.diff(value[np.argsort(reward, kind="stable")]) >= 0).all()
    moved, _ = advantages(rewards[differs] + shift, normalise)
    np.testing.assert_allclose(moved, values[differs], atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--grpo.group=1"], "grpo.group is 1, but must be at least 2"),
        (["--grpo.accumulate=3"], "grpo.accumulate is 3, but must divide the episodes of a step"),
        (["--grpo.clip_low=1.5"], "grpo.clip_low is 1.5, but must be at most 1"),
        (["--grpo.temperature=0"], "grpo.temperature is 0.0, but must be greater than 0"),
        (["--grpo.top_p=1.1"], "grpo.top_p is 1.1, but must be at most 1"),
        (["--grpo.kl=k4"], "grpo.kl is 'k4', but must be k1 or k2 or k3"),
        (["--grpo.reference=adapters_off"], "the policy has no adapters: set policy.lora.rank"),
        (["--reward.length_min=600"], "reward.length_min is 600, but must not exceed reward.length_max (512)"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert sentence in capsys.readouterr().err


def test_a_policy_with_adapters_can_be_its_own_reference():
    assert parse(["--grpo.reference=adapters_off", "--policy.lora.rank=4"]).grpo.reference == "adapters_off"


@pytest.fixture(scope="module")
def model() -> Qwen25VL:
    return create(d.ARCHITECTURE, PolicyConfig(), 0)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Episodes of two clips and two turns of unlike lengths; both turns are the policy's."""
    rng = np.random.default_rng(0)
    found = []
    for row in range(8):
        pieces = (3, d.clip(rng, "video", 2, 4, 4), 3 + row, d.clip(rng, "video", 2, 4, 4), 4)
        example = d.dialogue(rng, *pieces).example
        mask = example.loss_mask.copy()
        mask[9 : 11 + row] = True
        found.append(replace(example, loss_mask=mask))
    return found


@pytest.fixture(scope="module")
def batch(examples) -> Batch:
    return collate([[e] for e in examples], (48,), (64,))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_any_chunk_gives_the_log_probabilities_of_the_whole_softmax(model, batch, chunk):
    graphdef, state = nnx.split(model)
    temperature = 0.7

    @jax.jit
    def both(state):
        whole = nnx.merge(graphdef, state)
        return whole.logits(whole.hidden(batch)), token_log_probs(whole, batch, chunk=chunk, temperature=temperature)

    logits, ours = jax.device_get(both(state))
    scaled = np.float64(logits) / temperature
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_probs[:, :-1], batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(ours[:, 1:], np.where(batch.loss_mask[:, 1:], expected, 0), rtol=0, atol=MODEL_TOLERANCE)
    assert not ours[:, 0].any()
    assert ours.dtype == np.float32


def test_packed_rows_have_the_log_probabilities_of_unpacked_ones(model, examples):
    graphdef, state = nnx.split(model)

    def run(rows: list[list[Example]], tokens: int, patches: int, packed: bool) -> np.ndarray:
        batch = collate(rows, (tokens,), (patches,))
        forward = jax.jit(lambda state: token_log_probs(nnx.merge(graphdef, state), batch, chunk=16, packed=packed))
        return np.asarray(forward(state))[batch.loss_mask]

    alone = run([[e] for e in examples[:2]], 48, 64, False)
    np.testing.assert_allclose(run([examples[:2]], 96, 128, True), alone, rtol=MODEL_TOLERANCE)


def objective(state, graphdef, batch: Batch, old, ref, advantages, config: GrpoConfig) -> tuple[jax.Array, Totals]:
    log_probs = token_log_probs(nnx.merge(graphdef, state), batch, chunk=config.chunk, temperature=config.temperature)
    totals = grpo_loss(log_probs, old, ref, advantages, batch.loss_mask, config, LIMIT)
    return totals.loss, totals


@pytest.fixture(scope="module")
def texts() -> Batch:
    """Episodes without pictures: the tower on a mesh has tests of its own."""
    rng = np.random.default_rng(0)
    return collate([[d.dialogue(rng, 3, 9 + row).example] for row in range(8)], (24,), ())


@pytest.fixture(scope="module")
def gradient_on(mesh, model, texts) -> Callable[[str], tuple[nnx.State, Totals]]:
    """The gradient of the summed loss and the totals, on a mesh."""
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)
    host, config = jax.device_get(state), GrpoConfig(chunk=5, beta=0.3)
    old, ref = (np.float32(-5.5 + rng.normal(0, 0.3, texts.tokens.shape)) for _ in range(2))

    def loss(state, batch: Batch, old, ref, advantages) -> tuple[jax.Array, Totals]:
        whole = nnx.merge(graphdef, state)
        log_probs = token_log_probs(whole, batch, chunk=config.chunk, temperature=config.temperature)
        totals = grpo_loss(log_probs, old, ref, advantages, batch.loss_mask, config, LIMIT)
        return totals.loss, totals

    rest = (texts, old, ref, np.float32(rng.normal(size=8)))

    @cache
    def run(text: str) -> tuple[nnx.State, Totals]:
        with jax.set_mesh(mesh(text)):
            placed = jax.device_put(host, state_shardings(host, mesh(text)))
            return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(placed, *put_batch(rest, mesh(text))))

    return run


@pytest.mark.parametrize("mesh_text", ["8x1", "4x2"])
def test_loss_and_gradients_do_not_change_with_the_mesh(mesh_text, gradient_on, texts):
    (one, alone), (many, totals) = gradient_on("1x1"), gradient_on(mesh_text)
    assert alone.tokens == texts.loss_mask.sum()
    for name, want in vars(alone).items():
        assert getattr(totals, name) == pytest.approx(want, rel=MODEL_TOLERANCE), name
    for (path, a), b in zip(jax.tree.leaves_with_path(many), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(a - b) <= MODEL_TOLERANCE * np.linalg.norm(b), path
