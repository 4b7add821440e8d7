"""Our Qwen2.5-VL equals Hugging Face's on random weights: tower, language model, whole model, and greedy generation."""

from dataclasses import replace

import dialogues as d
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from flax import nnx

from vstar_jax.batch import collate
from vstar_jax.config import PolicyConfig
from vstar_jax.data.patches import window_order
from vstar_jax.data.positions import positions
from vstar_jax.models import hf
from vstar_jax.models.text import KVCache
from vstar_jax.sharding import make_mesh

TOLERANCE = 1e-4  # float32 on logits of order one: sums of another order, nothing else


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    """The torch model and ours, loaded from what it saved."""
    model = reference.torch_model(tie=request.param)
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    return model, hf.load(path, PolicyConfig(), make_mesh("1x1"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    model = reference.torch_model(tie=False, seed=1)
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    return model, hf.load(path, PolicyConfig(), make_mesh("1x1"))


def rows_of(case: str) -> list[d.Dialogue]:
    """Batches by name; the sides 6, 10 and 14 are no multiple of a window's 8 patches."""
    rng = np.random.default_rng(0)
    clip, dialogue = (lambda *a: d.clip(rng, *a)), (lambda *parts: d.dialogue(rng, *parts))
    match case:
        case "text":
            return [dialogue(12)]
        case "image":
            return [dialogue(3, clip("image", 1, 8, 8), 5)]
        case "non-square image":
            return [dialogue(3, clip("image", 1, 6, 14), 5)]
        case "image of several windows":
            return [dialogue(2, clip("image", 1, 18, 10), 5)]
        case "video":
            return [dialogue(4, clip("video", 3, 4, 4), 6)]
        case "video of several windows":
            return [dialogue(4, clip("video", 2, 10, 12), 6)]
        case "image and video":
            return [dialogue(2, clip("image", 1, 4, 10), 3, clip("video", 2, 6, 4), 4)]
        case "several clips":
            return [dialogue(2, clip("video", 2, 4, 6), 1, clip("video", 3, 10, 4), 2, clip("image", 1, 2, 2), 4)]
        case "padded batch":
            return [
                dialogue(9),
                dialogue(2, clip("video", 2, 10, 6), 3, clip("image", 1, 4, 4), 4),
                dialogue(1, clip("image", 1, 12, 4), 2),
            ]
    raise ValueError(case)


CASES = (
    "text",
    "image",
    "non-square image",
    "image of several windows",
    "video",
    "video of several windows",
    "image and video",
    "several clips",
    "padded batch",
)


def run(model, function, *arguments):
    """Calls `function(model, *arguments)` jitted."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *rest: function(nnx.merge(graphdef, state), *rest))(state, *arguments)


def collated(rows: list[d.Dialogue], extra: int = 0):
    """One example a row in the tightest shapes, with `extra` places of padding."""
    tokens = max(len(row.example.tokens) for row in rows) + extra
    patches = max(len(row.example.patches) for row in rows) + 4 * extra
    return collate([[row.example] for row in rows], (tokens,), (patches,))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(pair, case):
    theirs, ours = pair
    rows = rows_of(case)
    with torch.no_grad():
        expected = theirs(**reference.torch_inputs(rows)).logits.numpy()
    batch = collated(rows, extra=3 if case == "padded batch" else 0)
    logits = np.asarray(run(ours, lambda model, batch: model.logits(model.hidden(batch)), batch))
    assert logits.dtype == np.float32
    for row, got, want in zip(rows, logits, expected, strict=True):
        length = len(row.example.tokens)
        np.testing.assert_allclose(got[:length], want[:length], rtol=0, atol=TOLERANCE)


def test_every_part_of_a_case_reaches_the_logits(untied):
    """The comparison above could not see a picture that nobody looks at; here another picture moves the last logits."""
    _, ours = untied
    rows = rows_of("several clips")
    batch = collated(rows)
    logits = run(ours, lambda model, batch: model.logits(model.hidden(batch)), batch)
    at = 0
    for clip in rows[0].clips:
        patches = batch.vision.patches.copy()
        patches[:, at : at + len(clip.patches)] ^= 255
        other = replace(batch, vision=replace(batch.vision, patches=patches))
        changed = run(ours, lambda model, batch: model.logits(model.hidden(batch)), other)
        assert np.abs(np.asarray(changed - logits))[0, -1].max() > 100 * TOLERANCE
        at += len(clip.patches)


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 4, 4), (2, 10, 18), (2, 14, 6)])
def test_the_tower_equals_hugging_face(untied, grid):
    theirs, ours = untied
    rng = np.random.default_rng(1)
    clip = d.clip(rng, "video", *grid)
    row = d.dialogue(rng, clip, 2)
    with torch.no_grad():
        expected = theirs.model.visual(reference.pixel_values([clip]), torch.tensor([grid])).pooler_output.numpy()
    visual = np.asarray(run(ours, lambda model, vision: model.encode(vision), collated([row]).vision))[0]
    index = row.example.visual_index
    np.testing.assert_allclose(visual[index[index >= 0]], expected, rtol=0, atol=TOLERANCE)


def test_the_language_model_equals_hugging_face_on_any_embeddings_and_positions(untied):
    theirs, ours = untied
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 9, 64)).astype(np.float32)
    positions = rng.integers(0, 50, (2, 9, 3)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.model.language_model(
            inputs_embeds=torch.from_numpy(x), position_ids=torch.from_numpy(positions).long().permute(2, 0, 1)
        ).last_hidden_state.numpy()
    hidden = run(ours, lambda model, x, positions: model.text(x, positions, None), x, positions)
    np.testing.assert_allclose(np.asarray(hidden), expected, rtol=0, atol=TOLERANCE)


def greedy(model, rows: list[d.Dialogue], new: int) -> np.ndarray:
    """Greedy tokens int [B, new] by prefill and single-token decoding, in a cache that the prompts do not fill alike."""
    batch = collated(rows, extra=2)
    lengths = jnp.asarray([len(row.example.tokens) for row in rows])

    def prefill(model, batch):
        cache = KVCache.empty(model.architecture.text, len(rows), batch.tokens.shape[1] + new, jnp.float32)
        hidden, cache = model.extend(batch, cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return model.logits(last), cache

    logits, cache = run(model, prefill, batch)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, positions, *rest):
        model = nnx.merge(graphdef, state)
        return model.decode(tokens, model.angles(positions), *rest)

    positions = np.asarray([row.example.positions.max() for row in rows], np.int32)
    tokens = []
    for i in range(new):
        tokens.append(np.asarray(jnp.argmax(logits, -1), np.int32))
        logits, cache = step(state, tokens[-1], positions + 1 + i, np.ones(len(rows), bool), cache)
    np.testing.assert_array_equal(cache.lengths, lengths + new)
    return np.stack(tokens, 1)


def test_greedy_decoding_equals_hugging_face_on_a_padded_batch_with_pictures(untied):
    theirs, ours = untied
    rows, new = rows_of("padded batch"), 8
    expected = []
    for row in rows:
        inputs = reference.torch_inputs([row])
        tokens, positions = [], int(row.example.positions.max())
        with torch.no_grad():
            for i in range(new):
                tokens.append(int(theirs(**inputs).logits[0, -1].argmax()))
                inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[tokens[-1]]])], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                where = torch.full((3, 1, 1), positions + 1 + i)
                inputs["position_ids"] = torch.cat([inputs["position_ids"], where], 2)
        expected.append(tokens)
    np.testing.assert_array_equal(greedy(ours, rows, new), expected)


def test_greedy_decoding_of_text_equals_hugging_face_generate(pair):
    theirs, ours = pair
    row = d.dialogue(np.random.default_rng(3), 10)
    inputs = reference.torch_inputs([row])
    tokens = theirs.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=10,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(greedy(ours, [row], 10)[0], tokens[0, 10:].numpy())


def test_a_prompt_in_two_pieces_equals_the_prompt_in_one(untied):
    """The second turn is appended at each row's own cursor, over the padding that the first one left."""
    _, ours = untied
    rng = np.random.default_rng(4)
    first = [d.dialogue(rng, 4, d.clip(rng, "image", 1, 4, 6), 3), d.dialogue(rng, 5)]
    second = [d.dialogue(rng, 2), d.dialogue(rng, 3, d.clip(rng, "video", 2, 4, 4), 2)]
    starts = [int(row.example.positions.max()) + 1 for row in first]
    later = collated(second, extra=1)
    later.positions[:] += np.asarray(starts, np.int32)[:, None, None]
    cache = KVCache.empty(ours.architecture.text, 2, 64, jnp.float32)
    _, cache = run(ours, lambda model, batch, cache: model.extend(batch, cache), collated(first, extra=2), cache)
    pieces, cache = run(ours, lambda model, batch, cache: model.extend(batch, cache), later, cache)

    whole_rows = [[a.example, b.example] for a, b in zip(first, second, strict=True)]
    whole = collate(whole_rows, (64,), (256,))
    for b, row in enumerate(first):
        here = slice(len(row.example.tokens), len(row.example.tokens) + len(second[b].example.tokens))
        whole.positions[b, here] += starts[b]
    hidden = run(ours, lambda model, batch: model.hidden(batch), whole)
    for b, (a, c) in enumerate(zip(first, second, strict=True)):
        start, count = len(a.example.tokens), len(c.example.tokens)
        np.testing.assert_allclose(pieces[b, :count], hidden[b, start : start + count], rtol=0, atol=TOLERANCE)


def test_rows_that_are_not_active_leave_their_cache_alone(untied):
    _, ours = untied
    rng = np.random.default_rng(5)
    rows = [d.dialogue(rng, 6), d.dialogue(rng, 6)]
    cache = KVCache.empty(ours.architecture.text, 2, 10, jnp.float32)
    _, cache = run(ours, lambda model, batch, cache: model.extend(batch, cache), collated(rows), cache)
    tokens, positions = np.asarray([9, 9], np.int32), np.asarray([6, 6], np.int32)

    def decode(model, active, cache):
        return model.decode(tokens, model.angles(positions), active, cache)

    _, paused = run(ours, decode, np.asarray([True, False]), cache)
    np.testing.assert_array_equal(paused.lengths, [7, 6])
    waited, _ = run(ours, decode, np.asarray([False, True]), paused)
    direct, _ = run(ours, decode, np.asarray([True, True]), cache)
    np.testing.assert_allclose(waited[1], direct[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_data_side_lays_clips_out_as_these_dialogues_do(case):
    """So what holds above of the model holds of the model behind the project's own windows and positions."""
    for row in rows_of(case):
        example, clips = row.example, row.clips
        grids = [clip.grid for clip in clips]
        ours = positions(example.tokens, grids, [1.0] * len(grids), d.TOKENS_PER_SECOND, d.IMAGE_PAD, d.VIDEO_PAD)
        np.testing.assert_array_equal(ours, example.positions)
        at = 0
        for clip in clips:
            layout, here = window_order(clip.grid), slice(at, at + len(clip.patches))
            np.testing.assert_array_equal(clip.patches[layout.order], example.patches[here])
            np.testing.assert_array_equal(layout.patch_hw, example.patch_hw[here])
            np.testing.assert_array_equal(layout.frame_id, example.frame_id[here] - example.frame_id[at])
            np.testing.assert_array_equal(layout.window_id, example.window_id[here] - example.window_id[at])
            places = example.visual_index[(example.visual_index >= at // 4) & (example.visual_index < here.stop // 4)]
            np.testing.assert_array_equal(layout.inverse, places - at // 4)
            at = here.stop
