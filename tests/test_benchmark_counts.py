"""What MFU and decode bandwidth are counted from: held against what XLA counts and against the arrays themselves."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vstar_jax.batch import Batch, collate
from vstar_jax.benchmark import decoding, operations
from vstar_jax.benchmark.grpo import step_operations
from vstar_jax.benchmark.rollout import Workload
from vstar_jax.benchmark.size import Size, parameters
from vstar_jax.config import PolicyConfig
from vstar_jax.errors import UserError
from vstar_jax.models.attention import CAUSAL_BLOCKS
from vstar_jax.models.qwen2_5_vl import abstract
from vstar_jax.models.text import KVCache
from vstar_jax.objectives.sft import sft_loss
from vstar_jax.scaling.hlo import Module, flops

TOLERANCE = 1e-6
"""Relative: both sides are sums of the same whole numbers."""
DEVIATION = 0.02
"""Relative: that of 131,072 numbers is known to 0.2 %, and bfloat16 rounds as often up as down."""
TEXTS = (40, 24)
FAST = {"xla_backend_optimization_level": 0}
"""Nothing is run, and which products there are is decided before machine code is made."""
RELEASED = {"3b": 3_754_622_976, "7b": 8_292_166_656}
"""Parameters of the released checkpoints, as their index files count them."""


def sized(full_attention_layers: tuple[int, ...] = (0, 1), **kwargs: Any) -> Size:
    """Two layers on each side; frames of 16 x 16 patches are four whole windows."""
    size = replace(Size.of("tiny", remat="none"), grid=(2, 16, 16), **kwargs)
    text = replace(size.architecture.text, layers=2)
    vision = replace(size.architecture.vision, layers=2, full_attention_layers=full_attention_layers)
    return replace(size, architecture=replace(size.architecture, text=text, vision=vision))


def batch_of(size: Size) -> Batch:
    """Two rows with one clip each."""
    example = size.example(np.random.default_rng(0), TEXTS, learned=TEXTS[-1])
    return collate([[example]] * 2, (len(example.tokens),), (len(example.patches),))


def counted(function: Any, *arguments: Any) -> float:
    """Operations of the matrix products that XLA compiled, loops counted as often as they run."""
    return Module(jax.jit(function).lower(*arguments).compile(FAST).as_text()).total(flops)


@pytest.mark.parametrize("layers", [(), (0, 1)])
def test_a_clip_has_the_operations_that_xla_counts_with_windows_and_with_whole_frames(layers):
    size = sized(layers)
    graphdef, state = nnx.split(abstract(size.architecture, size.policy))
    found = counted(lambda state, vision: nnx.merge(graphdef, state).encode(vision), state, batch_of(size).vision)
    assert 2 * operations.clip_operations(size.architecture.vision, size.grid) == pytest.approx(found, rel=TOLERANCE)


def test_a_training_step_has_three_forward_passes_but_for_what_xla_hides_and_leaves_out():
    size = sized()
    batch, architecture = batch_of(size), size.architecture
    graphdef, state = nnx.split(abstract(size.architecture, size.policy))

    def loss(state: Any, batch: Batch) -> jax.Array:
        return sft_loss(nnx.merge(graphdef, state), batch, chunk=batch.tokens.shape[1], packed=False).loss

    rows, length = batch.tokens.shape
    # Causal attention goes in blocks of queries here, which compute and hide some keys; they are not the model's.
    block = -(-length // CAUSAL_BLOCKS)
    ends = [(start, min(start + block, length)) for start in range(0, length, block)]
    hidden = sum((end - start) * end for start, end in ends) - operations.seen(length)
    assert 0 < hidden < operations.seen(length) / 2
    hidden_operations = operations.text_operations(architecture.text, 0, hidden, 0)
    forward = rows * (operations.row_operations(size, 1, length, length) + hidden_operations)
    assert forward == pytest.approx(counted(loss, state, batch), rel=TOLERANCE)
    # Nobody needs the gradient of pixels.
    pixels = 2 * np.prod(batch.vision.patches.shape) * architecture.vision.hidden
    found = counted(jax.grad(loss), state, batch)
    assert operations.TRAINING * forward - pixels == pytest.approx(found, rel=TOLERANCE)


def test_a_decoded_token_has_the_operations_that_xla_counts_and_a_step_of_grpo_is_made_of_them():
    size, rows, slots = sized(), 3, 10
    text = size.architecture.text
    graphdef, state = nnx.split(abstract(size.architecture, size.policy))
    cache = KVCache.empty(text, rows, slots, jnp.dtype("float32"))
    ones = jnp.ones(rows, jnp.int32)

    def decoded(state: Any, cache: KVCache) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.decode(ones, model.angles(ones), ones > 0, cache)[0]

    found = counted(decoded, state, cache)
    assert rows * operations.text_operations(text, 1, slots, 1) == pytest.approx(found, rel=TOLERANCE)

    work, prompt = Workload(prompts=3, group=2, tokens=5), 20
    ahead = operations.clip_operations(size.architecture.vision, size.grid) + operations.text_operations(text, prompt, 210, 1)
    replies = sum(operations.text_operations(text, 1, prompt + written, 1) for written in range(1, 6))
    rollout = operations.rollout_operations(size, 1, 3, prompt, 2, 5)
    assert rollout == pytest.approx(3 * (ahead + 2 * replies), rel=TOLERANCE)
    whole = replace(size, prompt=(10, 10))
    learned = 3 * 2 * operations.row_operations(size, 1, 25, 5)
    for with_reference, passes in ((False, 3), (True, 4)):
        step = step_operations(whole, work, prompt, with_reference)
        assert step == pytest.approx(rollout + passes * learned, rel=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_decoding_are_those_of_the_arrays_that_it_reads(tied, dtype):
    size = sized()
    text = replace(size.architecture.text, tie_embeddings=tied)
    model = abstract(replace(size.architecture, text=text), PolicyConfig(param_dtype=dtype)).text
    width = jnp.dtype(dtype).itemsize
    head = model.embedding if model.lm_head is None else model.lm_head
    arrays = [*jax.tree.leaves(nnx.state(model.layers)), *jax.tree.leaves(nnx.state(model.norm)), *jax.tree.leaves(head)]
    assert decoding.weight_bytes(text, width) == sum(x.size * x.dtype.itemsize for x in arrays)

    prompts, prompt, group, written = 2, 7, 3, 4
    shared = KVCache.empty(text, prompts, prompt, jnp.dtype(dtype))
    own = [KVCache.empty(text, prompts * group, slots, jnp.dtype(dtype)) for slots in range(1, written + 1)]
    read = sum(c.keys.nbytes + c.values.nbytes for c in (*own, *[shared] * written))
    stored = own[-1].keys.nbytes + own[-1].values.nbytes
    expected = written * decoding.weight_bytes(text, width) + read + stored
    assert decoding.decode_bytes(text, prompts, prompt, group, written, width) == expected


@pytest.mark.parametrize("model", RELEASED)
def test_the_large_models_have_their_true_shapes_and_the_papers_clips(model):
    size = Size.of(model)
    assert parameters(abstract(size.architecture, size.policy)) == RELEASED[model]
    assert size.grid == (8, 18, 26)  # 16 frames, two a patch, of at most 128 * 28 * 28 pixels
    assert size.pixels <= 128 * 28 * 28
    example = size.example(np.random.default_rng(0), size.prompt)
    assert len(example.patches) == 8 * 18 * 26
    assert sorted(example.visual_index[example.visual_index >= 0]) == list(range(8 * 18 * 26 // 4))


def test_weights_are_drawn_in_the_type_that_they_are_kept_in_with_their_deviation():
    size = Size.of("tiny", param_dtype="bfloat16")
    state = nnx.state(size.random_policy())
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    embedding = np.asarray(state["text"]["embedding"].get_value(), np.float32)
    assert embedding.std() == pytest.approx(size.architecture.text.initializer_range, rel=DEVIATION)


@pytest.mark.parametrize("clip", [{"frames": 3}, {"pixels": 100}])
def test_a_clip_without_patches_is_one_sentence(clip):
    with pytest.raises(UserError, match="has no patches: give an even number of frames and at least 784 pixels"):
        Size.of("tiny", **clip)
