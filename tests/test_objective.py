"""The SFT loss is the log-likelihood of the targets, whatever the chunk, the packing and the rematerialisation."""

from collections.abc import Callable
from dataclasses import replace

import dialogues as d
import jax
import numpy as np
import pytest
from flax import nnx

from vstar_jax.batch import Batch, Example, collate
from vstar_jax.config import PolicyConfig
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract, create
from vstar_jax.objectives.sft import Totals, sft_loss

TOLERANCE = 1e-5  # relative, float32: the same terms in another order

SIZES = ((2, 4, 4), (1, 8, 8), (2, 6, 10))


@pytest.fixture(scope="module")
def model() -> Qwen25VL:
    return create(d.ARCHITECTURE, PolicyConfig(), 0)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Dialogues with clips of unlike grids and one of text alone."""
    rng = np.random.default_rng(0)
    pictures = [d.dialogue(rng, 2 + i, d.clip(rng, "video", *size), 4 + i).example for i, size in enumerate(SIZES)]
    return [*pictures, d.dialogue(rng, 9).example]


def gradient_of(model: Qwen25VL, chunk: int, packed: bool = False) -> tuple[Callable, nnx.State]:
    """The jitted (state, batch) -> (gradient of the summed loss, totals), and the state."""
    graphdef, state = nnx.split(model)

    def loss(state, batch):
        result = sft_loss(nnx.merge(graphdef, state), batch, chunk=chunk, packed=packed)
        return result.loss, result

    return jax.jit(jax.grad(loss, has_aux=True)), state


def run(model: Qwen25VL, batch: Batch, *, chunk: int, packed: bool = False) -> tuple[nnx.State, Totals]:
    gradient, state = gradient_of(model, chunk, packed)
    return jax.device_get(gradient(state, batch))


def totals(model: Qwen25VL, batch: Batch, *, chunk: int, packed: bool = False) -> Totals:
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, batch: sft_loss(nnx.merge(graphdef, state), batch, chunk=chunk, packed=packed))
    return jax.device_get(forward(state, batch))


def assert_same_gradients(ours: nnx.State, theirs: nnx.State) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b), path


@pytest.fixture(scope="module")
def small(examples) -> Batch:
    return collate([[e] for e in examples[:1]], (24,), (32,))


@pytest.fixture(scope="module")
def expected(model, small) -> nnx.State:
    """Gradients on the small batch with whole logits and nothing computed again."""
    return run(model, small, chunk=24)[0]


@pytest.mark.parametrize("chunk", [7, 1000])
def test_any_chunk_gives_the_log_likelihood_of_the_targets(model, examples, chunk):
    batch = collate([[e] for e in examples], (48,), (128,))
    graphdef, state = nnx.split(model)

    def all_logits(state, batch):
        whole = nnx.merge(graphdef, state)
        return whole.logits(whole.hidden(batch))

    logits = np.asarray(jax.jit(all_logits)(state, batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, at = np.nonzero(batch.loss_mask)
    loss = -log_probs[rows, at - 1, batch.tokens[rows, at]].sum()
    correct = (logits[rows, at - 1].argmax(-1) == batch.tokens[rows, at]).sum()

    result = totals(model, batch, chunk=chunk)
    assert result.count == len(rows)
    assert result.correct == correct
    assert result.loss == pytest.approx(loss, rel=TOLERANCE)


def test_the_chunk_does_not_change_the_gradients(model, small, expected):
    assert_same_gradients(run(model, small, chunk=5)[0], expected)


def test_packed_rows_have_the_losses_and_gradients_of_unpacked_ones(model, examples):
    alone, apart = run(model, collate([[e] for e in examples], (48,), (128,)), chunk=48)
    together, packed = run(model, collate([examples[:2], examples[2:]], (96,), (192,)), chunk=96, packed=True)
    assert packed.count == apart.count
    assert packed.correct == apart.correct
    assert packed.loss == pytest.approx(apart.loss, rel=TOLERANCE)
    assert_same_gradients(together, alone)


def test_packed_dialogues_would_see_each_other_without_their_segments(model, examples):
    """Else the test above would hold of a model that ignores what it attends to."""
    together = collate([examples[:2], examples[2:]], (96,), (192,))
    apart, mixed = totals(model, together, chunk=16, packed=True), totals(model, together, chunk=16, packed=False)
    assert abs(mixed.loss / apart.loss - 1) > 100 * TOLERANCE


VOCAB = 1 << 16


def temporary_bytes(length: int, chunk: int) -> int:
    """Temporary memory of the compiled gradient over one row of `length` tokens and a large vocabulary; nothing runs."""
    architecture = replace(d.ARCHITECTURE, text=replace(d.ARCHITECTURE.text, vocab=VOCAB, layers=1, heads=1, kv_heads=1))
    gradient, state = gradient_of(abstract(architecture, PolicyConfig(remat="full")), chunk)
    row = d.dialogue(np.random.default_rng(0), length).example
    return gradient.lower(state, collate([[row]], (length,), ())).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_sequence_times_vocabulary():
    whole_logits = 4 * VOCAB
    short, long = temporary_bytes(256, 64), temporary_bytes(768, 64)
    assert long - short < 0.1 * (768 - 256) * whole_logits  # attention and hidden states only
    assert temporary_bytes(768, 768) > long + 0.9 * (768 - 64) * whole_logits  # the measurement sees logits where they exist


@pytest.mark.parametrize("remat", ["none", "full"])  # the others ran with dots
def test_rematerialisation_changes_no_gradient(small, expected, remat):
    other = create(d.ARCHITECTURE, PolicyConfig(remat=remat), 0)
    assert_same_gradients(run(other, small, chunk=8)[0], expected)


def test_rematerialisation_of_whole_layers_saves_memory():
    batch = collate([[d.dialogue(np.random.default_rng(0), 64).example]], (64,), ())
    deep = replace(d.ARCHITECTURE, text=replace(d.ARCHITECTURE.text, layers=16))
    bytes_of = {}
    for remat in ("none", "full"):
        gradient, state = gradient_of(abstract(deep, PolicyConfig(remat=remat)), 8)
        bytes_of[remat] = gradient.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    assert bytes_of["full"] < 0.6 * bytes_of["none"]


def test_a_batch_without_targets_counts_nothing(model, examples):
    batch = collate([[replace(examples[3], loss_mask=np.zeros(9, bool))]], (16,), ())
    result = totals(model, batch, chunk=8)
    assert (result.loss, result.correct, result.count) == (0, 0, 0)
