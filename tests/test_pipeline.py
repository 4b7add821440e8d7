"""The training stream is the same whenever, wherever and on however many threads it runs, and loses nothing."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import jax
import model_directory
import numpy as np
import pytest

from vstar_jax.batch import Batch, Example
from vstar_jax.config import Config, DataConfig, SftConfig, VideoConfig
from vstar_jax.data.chat import Chat
from vstar_jax.data.pipeline import train_batches
from vstar_jax.data.processor import process
from vstar_jax.data.video import ReadCounts, VideoError, read
from vstar_jax.errors import UserError

ROWS = 4
RECORDS = 23


def config(*, pack: bool = False, threads: int = 2, seed: int = 0, **data: Any) -> Config:
    settings = dict(tokens=(64,), patches=(64,)) | data
    return Config(seed=seed, sft=SftConfig(batch_size=ROWS), data=DataConfig(pack=pack, threads=threads, **settings))


def draw(record: int, rng: np.random.Generator) -> Example:
    """A dialogue of 8 to 31 tokens and one or two windows: the record's number, then noise; token 0 names the record."""
    length, windows = int(rng.integers(8, 32)), int(rng.integers(1, 3))
    visual = np.full(length, -1, np.int32)
    visual[1 : 1 + 4 * windows] = np.arange(min(4 * windows, length - 1))
    return Example(
        tokens=np.r_[record + 1, rng.integers(100, 1000, length - 1)].astype(np.int32),
        positions=np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, 1),
        loss_mask=rng.random(length) < 0.5,
        visual_index=visual,
        patches=rng.integers(0, 256, (16 * windows, 1176), dtype=np.uint8),
        patch_hw=np.zeros((16 * windows, 2), np.int32),
        window_id=np.repeat(np.arange(windows, dtype=np.int32), 16),
        frame_id=np.repeat(np.arange(windows, dtype=np.int32), 16),
    )


def take(batches: Any, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def dialogues(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    """The tokens of every dialogue in the batches, in order."""
    return [
        tuple(row[segments == segment].tolist())
        for batch in batches
        for row, segments in zip(batch.tokens, batch.segments, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def records(batches: Sequence[Batch]) -> list[int]:
    return [tokens[0] - 1 for tokens in dialogues(batches)]


def assert_same(a: Sequence[Batch], b: Sequence[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(jax.tree.leaves(list(a)), jax.tree.leaves(list(b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("pack", [False, True])
def test_the_stream_does_not_depend_on_threads(pack: bool):
    reference = take(train_batches(range(RECORDS), draw, config(pack=pack, threads=1)), 12)
    assert_same(take(train_batches(range(RECORDS), draw, config(pack=pack, threads=4)), 12), reference)


def test_another_seed_gives_another_order_and_other_draws():
    a, b = (take(train_batches(range(RECORDS), draw, config(seed=seed)), 5) for seed in (0, 1))
    assert records(a) != records(b)
    assert not set(dialogues(a)) & set(dialogues(b))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_restored_state_goes_on_bit_for_bit(pack: bool, done: int):
    through = train_batches(range(RECORDS), draw, config(pack=pack))
    take(through, done)
    state = json.loads(json.dumps(through.get_state()))  # as a checkpoint keeps it
    expected = take(through, 10)
    fresh = train_batches(range(RECORDS), draw, config(pack=pack))
    fresh.set_state(state)
    assert_same(take(fresh, 10), expected)
    through.set_state(state)  # and on an iterator that has already gone on
    assert_same(take(through, 10), expected)


def test_every_epoch_shows_every_record_once_in_a_new_order_with_new_draws():
    batches = take(train_batches(range(ROWS * 5), draw, config()), 15)
    epochs = [records(batches[i : i + 5]) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(ROWS * 5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(set(dialogues(batches))) == ROWS * 15


def test_a_limited_number_of_epochs_ends_and_drops_what_fills_no_batch():
    found = records(list(train_batches(range(RECORDS), draw, config(), epochs=2)))
    assert len(found) == 2 * RECORDS // ROWS * ROWS


def test_packing_keeps_every_dialogue_whole_and_in_order():
    plain = dialogues(take(train_batches(range(RECORDS), draw, config()), 30))
    batches = take(train_batches(range(RECORDS), draw, config(pack=True)), 12)
    packed = dialogues(batches)
    assert packed == plain[: len(packed)]
    assert len(packed) > 12 * ROWS  # rows do hold several
    for batch in batches:
        assert batch.tokens.shape == (ROWS, 64)


def test_packing_keeps_targets_and_pictures():
    def examples():
        stream = train_batches(range(RECORDS), draw, config())
        for batch in stream:
            for b in range(ROWS):
                yield batch, b, batch.segments[b] == 1

    plain = examples()
    for batch in take(train_batches(range(RECORDS), draw, config(pack=True)), 5):
        for b in range(ROWS):
            for segment in range(1, batch.segments[b].max() + 1):
                other, row, there = next(plain)
                here = batch.segments[b] == segment
                np.testing.assert_array_equal(batch.loss_mask[b, here], other.loss_mask[row, there])
                np.testing.assert_array_equal(seen(batch, b, here), seen(other, row, there))


def seen(batch: Batch, row: int, tokens: np.ndarray) -> np.ndarray:
    """The merged patches that stand at the visual tokens among `tokens`."""
    visual = batch.visual_index[row, tokens]
    assert batch.vision is not None
    return batch.vision.patches[row].reshape(-1, 4 * 1176)[visual[visual >= 0]]


def test_a_row_is_packed_until_the_next_dialogue_does_not_fit():
    plain = dialogues(take(train_batches(range(RECORDS), draw, config()), 30))
    at = 0
    for batch in take(train_batches(range(RECORDS), draw, config(pack=True)), 5):
        for b in range(ROWS):
            assert batch.vision is not None
            at += int(batch.segments[b].max())
            patches = 4 * (batch.visual_index[b].max() + 1)
            held = int((batch.segments[b] > 0).sum())
            assert held <= 64
            # The next dialogue has at least 16 patches, so a row of more than 48 is full.
            assert held + len(plain[at]) > 64 or patches > 32


def test_processes_share_the_records_without_overlap_and_draw_alike():
    one = take(train_batches(range(RECORDS), draw, config()), 5)
    shards = [train_batches(range(RECORDS), draw, config(), epochs=1, process_index=i, process_count=2) for i in range(2)]
    parts = [list(shard) for shard in shards]
    assert all(batch.tokens.shape[0] == ROWS // 2 for part in parts for batch in part)
    first, second = (dialogues(part) for part in parts)
    assert not {d[0] for d in first} & {d[0] for d in second}
    assert len(first) + len(second) >= RECORDS - 2  # what fills no batch of 2 is dropped
    assert set(dialogues(one)[: 2 * len(second)]) == {*first[: len(second)], *second}  # as one process would have drawn them


def test_processes_agree_on_shapes():
    def agree(own: Sequence[int]) -> Sequence[int]:
        return [max(number, other) for number, other in zip(own, (33, 33), strict=False)] if len(own) == 2 else own

    sizes = config(tokens=(32, 64), patches=(32, 64))
    alone = train_batches(range(RECORDS), draw, sizes, process_index=1, process_count=2)
    together = train_batches(range(RECORDS), draw, sizes, process_index=1, process_count=2, agree=agree)
    assert {batch.tokens.shape for batch in take(alone, 5)} == {(2, 32)}
    assert {batch.tokens.shape for batch in take(together, 5)} == {(2, 64)}
    assert {batch.vision.patches.shape[1] for batch in take(together, 5)} == {64}


def test_records_without_an_example_are_left_out_and_nothing_takes_their_place():
    def partly(record: int, rng: np.random.Generator) -> Example | None:
        return None if record % 3 == 0 else draw(record, rng)

    found = records(list(train_batches(range(24), partly, config(), epochs=1)))
    assert sorted(found) == [n for n in range(24) if n % 3]


def test_an_empty_split_is_one_clear_sentence():
    with pytest.raises(UserError, match="the training split has 0 clips"):
        train_batches([], draw, config())


def test_a_split_smaller_than_the_processes_is_one_clear_sentence():
    with pytest.raises(UserError, match=r"has 1 clips for 2 process\(es\)"):
        train_batches([1], draw, config(), process_count=2)


def test_rows_that_processes_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"sft\.batch_size is 4"):
        train_batches(range(RECORDS), draw, config(), process_count=3)


def test_a_split_of_which_nothing_can_be_read_ends_with_a_sentence():
    with pytest.raises(UserError, match="none of the 23 training clips can be read"):
        next(train_batches(range(RECORDS), lambda record, rng: None, config()))


def test_a_faulty_example_stops_the_stream_with_its_own_error():
    def faulty(record: int, rng: np.random.Generator) -> Example:
        raise ZeroDivisionError("in the draw")

    with pytest.raises(ZeroDivisionError, match="in the draw"):
        next(train_batches(range(RECORDS), faulty, config()))


def test_real_clips_train_and_broken_ones_are_named_and_counted(tmp_path: Path, caplog):
    clips = [write(tmp_path / f"clip{n}.mp4", frames=1 if n == 0 else 12) for n in range(6)]
    clips[1].write_bytes(clips[1].read_bytes()[:1000])
    clips[2].unlink()
    chat = Chat(model_directory.write(tmp_path / "model"), VideoConfig(frames=4))
    counts = ReadCounts()

    def example(path: Path, rng: np.random.Generator) -> Example | None:
        try:
            clip = read(path, chat.video.frames, counts=counts)
        except VideoError as error:
            logging.warning("left out of training: %s", error)
            return None
        words = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": path.stem}]
        return chat.encode(words, [process(clip.frames, clip.fps, chat.video)])

    batches = list(train_batches(clips, example, config(), epochs=1))
    answers = [chat.decode(batch.tokens[b][batch.loss_mask[b]]) for batch in batches for b in range(ROWS)]
    assert sorted(answers) == ["clip0", "clip3", "clip4", "clip5"]
    assert counts.snapshot() == {"decord": 4, "pyav": 0, "failed": 2}
    assert all(any(name in line for line in caplog.messages) for name in ("clip1.mp4", "clip2.mp4"))


def write(path: Path, frames: int) -> Path:
    """A real video file of noise."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(frames):
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
