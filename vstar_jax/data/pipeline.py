"""The training stream: records of a random-access source in, batches out, on threads, resumable at any batch.

Built of grain: every random choice follows from (seed, epoch, record), so the stream is the same whatever the number of
threads and wherever it was resumed. `training` saves the iterator's state in its checkpoints.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from vstar_jax.batch import Agree, Batch, Example, collate
from vstar_jax.config import Config
from vstar_jax.errors import UserError

Record = TypeVar("Record")
MakeExample = Callable[[Record, np.random.Generator], Example | None]
Row = list[Example]

PREFETCHED_BATCHES = 2


def train_batches(
    source: Sequence[Record],
    make_example: MakeExample,
    config: Config,
    *,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    agree: Agree = lambda own: own,
) -> "Batches":
    """A stream of `batch.Batch` in numpy over shuffled records; its get_state and set_state continue it exactly.

    source: random access to records. make_example: draws the dialogue of a record with a generator of its own, on
    `config.data.threads` threads; None leaves the record out, and no other takes its place. epochs: None goes on for ever,
    each epoch in a new order and with new draws; what does not fill a last batch is dropped. Process i of n takes every n-th
    record and makes 1 / n of the rows of a batch; the shapes, those of all rows, come from `agree` (`batch.collate`).
    UserError when the source is empty, when no record of an epoch gives an example, or when the rows do not divide.
    """
    rows = config.sft.batch_size // process_count
    if rows * process_count != config.sft.batch_size:
        raise UserError(f"sft.batch_size is {config.sft.batch_size}: choose a multiple of the {process_count} processes.")
    if len(source) < process_count:
        raise UserError(
            f"the training split has {len(source)} clips for {process_count} process(es), but each needs one at least: "
            "prepare the dataset again or choose another."
        )
    tokens, patches = config.data.tokens, config.data.patches
    per_epoch = len(range(process_index, len(source), process_count))
    records = grain.MapDataset.source(source).seed(config.seed)
    # Drawn before it is shuffled and split, so that a record's generator depends on neither.
    examples = records.random_map(_Guarded(make_example, per_epoch)).shuffle()[process_index::process_count].repeat(epochs)
    reading = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=max(rows, config.data.threads))
    stream = examples.to_iter_dataset(reading)
    if config.data.pack:
        packed: grain.IterDataset[Row] = PackedRows(stream, max(tokens), max(patches))
    else:
        packed = stream.map(lambda example: [example])
    batches = packed.batch(rows, drop_remainder=True, batch_fn=list)
    return Batches(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCHED_BATCHES), config, agree
    )


class Batches:
    """An iterator of batches, laid out where they are asked for: processes agree on shapes from their main threads alone."""

    def __init__(self, rows: "grain.IterDataset[list[Row]]", config: Config, agree: Agree):
        self.rows, self.data, self.agree = iter(rows), config.data, agree

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return collate(next(self.rows), self.data.tokens, self.data.patches, self.agree)

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return self.rows.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.rows.set_state(state)


class _Guarded(Generic[Record]):
    """`make_example` that gives up when a whole epoch in a row gave nothing: the stream would search for ever."""

    def __init__(self, make_example: MakeExample, per_epoch: int):
        self.make_example, self.per_epoch = make_example, per_epoch
        self.lock, self.failures = threading.Lock(), 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Example | None:
        example = self.make_example(record, rng)
        with self.lock:
            self.failures = 0 if example is not None else self.failures + 1
            if self.failures >= self.per_epoch:
                raise UserError(
                    f"none of the {self.per_epoch} training clips can be read: check data.dir and the files that the log names."
                )
        return example


class PackedRows(grain.IterDataset[Row]):
    """Fills rows with whole examples in the order in which they come, until the next one no longer fits.

    tokens, patches: what a row may hold at most; an example that is larger makes a row of its own, which `collate` refuses.
    """

    def __init__(self, parent: "grain.IterDataset[Example]", tokens: int, patches: int):
        super().__init__(parent)
        self.tokens, self.patches = tokens, patches

    def __iter__(self) -> "grain.DatasetIterator[Row]":
        return _PackedRowsIterator(iter(self._parent), self.tokens, self.patches)


class _PackedRowsIterator(grain.DatasetIterator[Row]):
    """Keeps the first example of the next row at hand; its state is the parent's before that example, so nothing is lost."""

    def __init__(self, parent: "grain.DatasetIterator[Example]", tokens: int, patches: int):
        super().__init__(parent)
        self.tokens, self.patches = tokens, patches
        self.waiting: Example | None = None
        self.before_waiting: dict[str, Any] = {}

    def __next__(self) -> Row:
        row = [] if self.waiting is None else [self.waiting]
        self.waiting = None
        while True:
            before = self._parent.get_state()
            example = next(self._parent, None)
            if example is None:
                if row:
                    return row
                raise StopIteration
            if row and not self._fits([*row, example]):
                self.waiting, self.before_waiting = example, before
                return row
            row.append(example)

    def _fits(self, row: Row) -> bool:
        return sum(len(e.tokens) for e in row) <= self.tokens and sum(len(e.patches) for e in row) <= self.patches

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state() if self.waiting is None else self.before_waiting

    def set_state(self, state: dict[str, Any]) -> None:
        self.waiting = None
        self._parent.set_state(state)
