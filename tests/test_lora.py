"""Low-rank adapters: where they go, that they alone are trained, and that merging them changes nothing."""

import dialogues as d
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from vstar_jax.batch import Batch, collate
from vstar_jax.config import LoraConfig, PolicyConfig, SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models import hf, lora
from vstar_jax.models.layers import LoraParam
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract, create
from vstar_jax.sharding import make_mesh, put_batch
from vstar_jax.training.state import create_state, make_train_step

TOLERANCE = 1e-5  # float32 on logits of order one: x (W + AB) against x W + (x A) B

EVERYWHERE = LoraConfig(rank=2, alpha=4.0, pattern=".*")


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    return collate([[d.dialogue(rng, 3, d.clip(rng, "video", 2, 4, 4), 5).example] for _ in range(2)], (24,), (32,))


@pytest.fixture
def model() -> Qwen25VL:
    return create(d.ARCHITECTURE, PolicyConfig(), 0)


def logits(model: Qwen25VL, batch: Batch) -> np.ndarray:
    graphdef, state = nnx.split(model)

    def run(state, batch):
        whole = nnx.merge(graphdef, state)
        return whole.logits(whole.hidden(batch))

    return np.asarray(jax.jit(run)(state, batch))


def randomise(model: Qwen25VL) -> None:
    """Gives the adapters the values that training might have given them."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        variable.set_value(jax.numpy.asarray(0.1 * rng.standard_normal(variable.get_value().shape), jax.numpy.float32))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            LoraConfig().pattern,
            {f"text/layers/{p}_proj" for p in "qkvo"} | {f"text/layers/mlp/{p}_proj" for p in ("gate", "up", "down")},
        ),
        ("visual/blocks/(qkv|proj)$", {"visual/blocks/qkv", "visual/blocks/proj"}),
        ("merger", {"visual/merger_in", "visual/merger_out"}),
    ],
    ids=["default", "tower attention", "merger"],
)
def test_the_pattern_says_which_layers_get_adapters(pattern, expected):
    model = abstract(d.ARCHITECTURE, PolicyConfig())
    lora.add(model, LoraConfig(rank=2, pattern=pattern), 0)
    assert {path for path, layer in lora.linears(model).items() if layer.lora_a is not None} == expected


def test_a_pattern_that_matches_nothing_or_is_none_is_refused(model):
    with pytest.raises(UserError, match=r"matches no layer: the layers are .*text/layers/q_proj"):
        lora.add(model, LoraConfig(rank=2, pattern="query"), 0)
    with pytest.raises(UserError, match="is no regular expression"):
        lora.add(model, LoraConfig(rank=2, pattern="("), 0)


def test_new_adapters_change_nothing_and_used_ones_merge_into_the_same_model(model, batch, tmp_path):
    before = logits(model, batch)
    lora.add(model, EVERYWHERE, 0)
    np.testing.assert_array_equal(logits(model, batch), before)

    randomise(model)
    unmerged = logits(model, batch)
    assert np.abs(unmerged - before).max() > 100 * TOLERANCE
    with pytest.raises(ValueError, match="merge the LoRA adapters"):
        hf.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

    lora.merge(model)
    assert not jax.tree.leaves(nnx.state(model, LoraParam))
    np.testing.assert_allclose(logits(model, batch), unmerged, rtol=0, atol=TOLERANCE)

    hf.save(model, tmp_path / "model")
    loaded = hf.load(tmp_path / "model", PolicyConfig(), make_mesh("1x1"))
    np.testing.assert_allclose(logits(loaded, batch), unmerged, rtol=0, atol=TOLERANCE)


def test_with_its_adapters_off_a_model_is_what_it_was_before_them(model, batch):
    before = logits(model, batch)
    lora.add(model, EVERYWHERE, 0)
    randomise(model)
    graphdef, state = nnx.split(model)

    @jax.jit
    def policy_and_reference(state):
        policy = nnx.merge(graphdef, state)
        reference = lora.without(policy)
        return reference.logits(reference.hidden(batch)), policy.logits(policy.hidden(batch))

    reference, policy = policy_and_reference(state)
    np.testing.assert_allclose(reference, before, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(policy, logits(model, batch), rtol=0, atol=TOLERANCE)
    assert np.abs(policy - reference).max() > 100 * TOLERANCE
    assert jax.tree.leaves(nnx.state(model, LoraParam))
    assert lora.without(model).text.embedding.get_value() is model.text.embedding.get_value()


def test_only_adapters_are_trained(model, batch):
    config = LoraConfig(rank=2, pattern="text/layers/(q_proj|o_proj)|visual/blocks/qkv")
    lora.add(model, config, 0)
    randomise(model)
    mesh, optimizer = make_mesh("2x2"), optax.sgd(0.1)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, config, mesh, 0)
        params, frozen = jax.device_get((state.params, state.frozen))
        names = {key[-1] for key, _ in nnx.to_flat_state(params)}
        assert names == {"lora_a", "lora_b"}
        state, _ = make_train_step(graphdef, optimizer, SftConfig(chunk=8), False, state)(state, put_batch(batch, mesh))
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(before, after)
    for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(before, after)
