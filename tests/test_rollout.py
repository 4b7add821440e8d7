"""Claims about rollouts: both drivers and all meshes give the same tokens, a shard calls once a turn, groups share a prompt."""

import math
import re
import threading
from dataclasses import replace

import dialogues as d
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vstar_jax.batch import Turn, collate
from vstar_jax.config import PolicyConfig
from vstar_jax.models.qwen2_5_vl import create
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.episode import Rollout, Sampling, episode_keys
from vstar_jax.rollout.sampler import decode, prefill
from vstar_jax.rollout.weights import gather, rollout_weights
from vstar_jax.sharding import mesh_shape, put_batch, state_shardings

PROMPTS, MEMBERS, LIMIT, TURN = 8, 2, 5, 24
SHORT = 5e-2  # bfloat16: the same products, in a program that is fused otherwise
LOG_PROB = 1e-5  # float32: the same kernels, compiled in one program or in two
CACHED = 1e-4  # float32 sums of another order: a shared prefix and an own cache against one cache


@pytest.fixture(scope="module")
def model():
    return create(d.ARCHITECTURE, PolicyConfig(), 0)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    clip = d.clip(rng, "video", 2, 4, 4)
    return [d.dialogue(rng, n, clip, n + 2).example for n in (3, 5, 7, 4, 4, 6, 3, 5)]


class Answers:
    """A host with a second clip and text of its own for each row; it counts its calls and its rows.

    anew: its positions count from 0 and not from what was before. given: what it gave each row.
    """

    def __init__(self, anew: bool = False):
        self.anew, self.given = anew, {}
        rng = np.random.default_rng(1)
        clip = d.clip(rng, "video", 2, 4, 4)
        self.examples = [d.dialogue(rng, 2 + n % 3, clip, 3).example for n in range(PROMPTS * MEMBERS)]
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.lock = threading.Lock()

    def __call__(self, turn, episodes, tokens, lengths, positions):
        with self.lock:
            self.calls.append((turn, tuple(episodes.tolist())))
        # What the policy wrote decides what comes back, so that a wrong hand-over shows.
        picked = [
            self.examples[(int(n) + int(t[:k].sum())) % len(self.examples)]
            for n, t, k in zip(episodes, tokens, lengths, strict=True)
        ]
        with self.lock:
            self.given |= dict(zip(episodes.tolist(), picked, strict=True))
        batch = collate([[e] for e in picked], (TURN,), (32,))
        positions = np.zeros_like(positions) if self.anew else positions
        batch = replace(batch, positions=np.where(batch.segments[..., None] > 0, batch.positions + positions[:, None, None], 0))
        following = positions + np.asarray([e.positions.max() + 1 for e in picked], np.int32)
        return Turn(batch, following, np.ones(len(episodes), bool))


def roll(
    model,
    examples,
    mesh,
    mode,
    *,
    turns=2,
    members=MEMBERS,
    temperature=1.0,
    numbers=None,
    history="append",
    gathered=False,
    cache="same",
):
    """Completions on the host, and the host itself; gathered: with a copy of the weights that is whole along data."""
    graphdef, state = nnx.split(model)
    host = Answers(anew=history == "replace")
    numbers = list(range(len(examples))) if numbers is None else numbers
    episodes = np.asarray([n * members + g for n in numbers for g in range(members)], np.int32)
    starts = np.asarray([e.positions.max() + 1 for e in examples], np.int32)
    batch = collate([[e] for e in examples], (32,), (32,))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(state, mesh))
        state = rollout_weights(state, model.text.dtype.name, mesh) if gathered else state
        sampling = Sampling((LIMIT,), temperature, turns=turns)
        rollout = Rollout(graphdef, host, TURN, np.zeros(0, np.int32), sampling, mesh, mode, history, cache)
        replies = rollout(state, put_batch(batch, mesh), starts, episode_keys(3, numbers, members), episodes)
        return jax.device_get(replies), host


@pytest.mark.parametrize("turns", [2, 3])
def test_both_drivers_give_the_same_tokens_and_log_probs(model, prompts, mesh, turns):
    called, _ = roll(model, prompts, mesh("1x1"), "callback", turns=turns)
    stepped, _ = roll(model, prompts, mesh("1x1"), "segmented", turns=turns)
    assert len(called) == len(stepped) == turns
    for a, b in zip(called, stepped, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.lengths, b.lengths)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=LOG_PROB)


@pytest.mark.parametrize("mode", ["callback", "segmented"])
def test_with_replaced_history_a_turn_is_answered_as_if_it_stood_alone(model, prompts, mesh, mode):
    """The second reply is what decoding from the turn's input alone gives, whatever the first one was."""
    (_, second), host = roll(model, prompts, mesh("1x1"), mode, history="replace", temperature=0.0)
    picked = [host.given[n] for n in range(PROMPTS * MEMBERS)]
    cache = KVCache.empty(model.text.cfg, len(picked), TURN + LIMIT, model.text.dtype)
    logits, cache = prefill(model, collate([[e] for e in picked], (TURN,), (32,)), cache)
    starts = jnp.asarray([e.positions.max() + 1 for e in picked])
    keys = episode_keys(3, range(PROMPTS), MEMBERS)
    alone, _ = decode(model, logits, starts, cache, keys, jnp.zeros(0, jnp.int32), limit=LIMIT, temperature=0.0)
    np.testing.assert_array_equal(second.tokens, alone.tokens)
    np.testing.assert_allclose(second.log_probs, alone.log_probs, atol=LOG_PROB)
    (_, appended), _ = roll(model, prompts, mesh("1x1"), mode, temperature=0.0)
    assert np.abs(appended.log_probs - alone.log_probs).max() > 100 * LOG_PROB


@pytest.mark.parametrize("shape", ["8x1", "4x2", "2x4", "2x2x2"])
def test_the_callback_comes_once_a_shard_and_turn_and_changes_no_token(model, prompts, mesh, shape):
    alone, _ = roll(model, prompts, mesh("1x1"), "segmented")
    spread, host = roll(model, prompts, mesh(shape), "callback")
    assert [turn for turn, _ in host.calls] == [1] * math.prod(mesh_shape(shape)[:2])
    assert sorted(n for _, episodes in host.calls for n in episodes) == list(range(PROMPTS * MEMBERS))
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("shape", ["8x1", "4x2"])
def test_a_gathered_copy_of_the_weights_changes_no_token(prompts, mesh, shape):
    """In bfloat16 from float32 parameters, which is where the copy is another one than what training has."""
    mixed = create(d.ARCHITECTURE, PolicyConfig(dtype="bfloat16"), 0)
    split, _ = roll(mixed, prompts, mesh(shape), "callback")
    whole, _ = roll(mixed, prompts, mesh(shape), "callback", gathered=True)
    for a, b in zip(split, whole, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=SHORT)


def test_the_copy_of_the_weights_is_short_and_whole_along_data_and_the_rest_is_no_copy(model, mesh):
    _, state = nnx.split(create(d.ARCHITECTURE, PolicyConfig(dtype="bfloat16"), 0))
    on = mesh("4x2")
    state = jax.device_put(state, state_shardings(state, on))
    copy = rollout_weights(state, "bfloat16", on)
    table = copy.text.embedding.get_value()
    assert table.dtype == jnp.bfloat16
    assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1])
    again = rollout_weights(copy, "bfloat16", on)
    assert all(a is b for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(again), strict=True))
    assert gather.cache_info().currsize  # a step's copy is not compiled anew


def test_a_decoded_token_gathers_no_weight_from_a_copy_that_is_whole(prompts, mesh):
    """Split over data, all of them would cross the network once a token."""
    model = create(d.ARCHITECTURE, PolicyConfig(), 0)
    graphdef, state = nnx.split(model)
    on, gathers = mesh("8x1"), {}
    with jax.set_mesh(on):
        state = jax.device_put(state, state_shardings(state, on))
        for name, weights in (("split", state), ("gathered", rollout_weights(state, "float32", on))):
            cache = KVCache.empty(model.text.cfg, PROMPTS, 32, model.text.dtype)
            tokens, active = put_batch((np.zeros(PROMPTS, np.int32), np.ones(PROMPTS, bool)), on)

            def step(weights, cache, tokens, active):
                model = nnx.merge(graphdef, weights)
                return model.decode(tokens, model.angles(tokens), active, cache)

            text = jax.jit(step).lower(weights, cache, tokens, active).compile().as_text()
            gathers[name] = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert len(gathers["split"]) > 5
    assert not gathers["gathered"]


@pytest.mark.parametrize(("cache", "tolerance"), [("bfloat16", 2e-2), ("float8_e4m3fn", 2e-1)])
def test_a_shorter_cache_stays_near_the_whole_one(model, prompts, mesh, cache, tolerance):
    """bfloat16 keeps 8 bits of a number, float8_e4m3fn 4: the log-probabilities of the first reply's first token tell."""
    whole, _ = roll(model, prompts, mesh("1x1"), "segmented", turns=1)
    short, _ = roll(model, prompts, mesh("1x1"), "segmented", turns=1, cache=cache)
    same = whole[0].tokens[:, 0] == short[0].tokens[:, 0]
    assert same.mean() > 0.9
    assert 0 < np.abs(whole[0].log_probs - short[0].log_probs)[same, :2].max() < tolerance


def test_a_row_writes_the_same_in_any_company(model, prompts, mesh):
    everyone, _ = roll(model, prompts, mesh("1x1"), "segmented")
    order = [5, 2]
    few, _ = roll(model, [prompts[i] for i in order], mesh("1x1"), "segmented", numbers=order)
    rows = [n * MEMBERS + g for n in order for g in range(MEMBERS)]
    for a, b in zip(everyone, few, strict=True):
        np.testing.assert_array_equal(a.tokens[rows], b.tokens)


def test_members_of_a_group_differ_and_greedy_ones_do_not(model, prompts, mesh):
    sampled, _ = roll(model, prompts, mesh("1x1"), "segmented", turns=1)
    pairs = sampled[0].tokens.reshape(PROMPTS, MEMBERS, -1)
    assert (pairs[:, 0] != pairs[:, 1]).any()
    greedy, _ = roll(model, prompts, mesh("1x1"), "segmented", turns=1, temperature=0.0)
    pairs = greedy[0].tokens.reshape(PROMPTS, MEMBERS, -1)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])


def test_a_shared_prompt_is_as_good_as_a_copy_in_each_row(model, prompts):
    starts = jnp.asarray([e.positions.max() + 1 for e in prompts])
    keys = episode_keys(3, range(len(prompts)), MEMBERS)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    options = dict(limit=LIMIT, temperature=1.0)
    batch = collate([[e] for e in prompts for _ in range(MEMBERS)], (32,), (32,))
    cache = KVCache.empty(model.text.cfg, len(keys), 32 + LIMIT, model.text.dtype)
    logits, cache = prefill(model, batch, cache)
    none = jnp.zeros(0, jnp.int32)
    copied, _ = decode(model, logits, jnp.repeat(starts, MEMBERS), cache, keys, none, **options)

    logits, prefix = prefill(
        model, collate([[e] for e in prompts], (32,), (32,)), KVCache.empty(model.text.cfg, 8, 32, model.text.dtype)
    )
    cache = prefix.shared(MEMBERS, LIMIT)
    assert cache.slots == LIMIT
    assert cache.prefix is prefix
    shared, _ = decode(model, jnp.repeat(logits, MEMBERS, 0), jnp.repeat(starts, MEMBERS), cache, keys, none, **options)
    np.testing.assert_array_equal(shared.tokens, copied.tokens)
    np.testing.assert_allclose(shared.log_probs, copied.log_probs, atol=CACHED)


def test_an_episode_that_is_over_writes_nothing_more(model, prompts, mesh):
    class Halting(Answers):
        def __call__(self, turn, episodes, tokens, lengths, positions):
            answer = super().__call__(turn, episodes, tokens, lengths, positions)
            return replace(answer, active=episodes % 2 == 0)

    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh("1x1")):
        rollout = Rollout(graphdef, Halting(), TURN, np.zeros(0, np.int32), Sampling((LIMIT,), 1.0), mesh("1x1"), "callback")
        batch = put_batch(collate([[e] for e in prompts], (32,), (32,)), mesh("1x1"))
        starts = np.asarray([e.positions.max() + 1 for e in prompts], np.int32)
        first, second = jax.device_get(
            rollout(state, batch, starts, episode_keys(3, range(8), 2), np.arange(16, dtype=np.int32))
        )
    assert (first.lengths == LIMIT).all()
    assert second.lengths.tolist() == [LIMIT, 0] * 8
    assert not second.tokens[1::2].any()
