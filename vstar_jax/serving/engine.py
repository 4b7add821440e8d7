"""The policy as a service: one thread owns the model, requests take free rows of a running batch and leave them when they end.

A request is prefilled alone, in the bucket that holds it, into a free row; all rows then decode together, some tokens at a
time, so that text can be sent while it is written. The programs are one for each bucket and one for decoding.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import sharding
from vstar_jax.batch import Batch, Example, bucket, collate
from vstar_jax.models.config import Architecture, TextArchitecture
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.sampler import draw, nucleus, prefill, uniform
from vstar_jax.rollout.weights import rollout_weights

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.05
"""How often a thread without work looks whether it is to stop."""


class Busy(Exception):
    """There is no room for another request now."""


@dataclass(frozen=True)
class Sizes:
    """What is compiled: rows that decode together, tokens decoded between two looks at the requests, most tokens of a reply,
    requests that may wait, and the ascending buckets of prompt tokens and patches.
    """

    rows: int
    chunk: int
    new_tokens: int
    queue: int
    tokens: tuple[int, ...]
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A prompt and how its reply is sampled.

    limit: most new tokens; temperature: 0 takes the most likely token; top_p: of the nucleus; seed: the same one gives the same
    reply, whoever else is served.
    """

    prompt: Example
    limit: int
    temperature: float
    top_p: float
    seed: int


@dataclass(eq=False)
class Job:
    """An `Ask` on its way: `tell` gets new token ids and, at the end, why it ended: stop, length, or an exception.

    tell is called by the engine's thread and must not block.
    """

    ask: Ask
    tell: Callable[[list[int], str | Exception | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    written: int = 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "positions", "at", "limits", "done", "seeds", "temperature", "top_p"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """The running batch: the cache, logits float32 [B, V] and position int32 [B] of each row's next token, `at` int32 [B] its
    place in the reply, limits int32 [B], done bool [B] (free rows are done), and how each row samples, [B].
    """

    cache: KVCache
    logits: jax.Array
    positions: jax.Array
    at: jax.Array
    limits: jax.Array
    done: jax.Array
    seeds: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class Engine:
    """Serves jobs until `close`. load: gives graph definition and parameters, in the engine's thread."""

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        architecture: Architecture,
        dtype: str,
        stop_ids: np.ndarray,
        sizes: Sizes,
        mesh: Mesh,
    ):
        """dtype: of the activations and the cache; stop_ids int32 [n]: the tokens that end a reply."""
        self.sizes = sizes
        self._load, self._text, self._dtype, self._mesh = load, architecture.text, dtype, mesh
        self._stop_ids = jnp.asarray(stop_ids)
        self._waiting: queue.Queue[Job] = queue.Queue(sizes.queue)
        self._jobs: list[Job | None] = [None] * sizes.rows
        self._ready, self._closing = threading.Event(), threading.Event()
        self._on_failure: Callable[[Exception], None] = lambda error: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Loads the model and serves, in a thread; on_failure: told when the model cannot be loaded."""
        self._on_failure = on_failure
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._ready.is_set()

    @property
    def busy(self) -> int:
        """Rows that are taken."""
        return sum(job is not None for job in self._jobs)

    @property
    def waiting(self) -> int:
        """Jobs that have no row yet."""
        return self._waiting.qsize()

    def check(self, prompt: Example) -> None:
        """ValueError when the prompt fits no bucket."""
        bucket(len(prompt.tokens), self.sizes.tokens, "tokens")
        bucket(len(prompt.patches), self.sizes.patches, "patches")

    def submit(self, job: Job) -> None:
        """Queues a job whose prompt fits. Raises Busy when the queue is full."""
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise Busy from None

    def close(self, seconds: float = 10.0) -> None:
        """Stops after the tokens that are being decoded; whoever still waits is told."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                self._serve(*self._load())
        except Exception as error:
            log.debug("the engine ended", exc_info=True)
            self._on_failure(error)
        finally:
            self._ready.clear()
            self._fail(RuntimeError("the server is shutting down."))

    def _serve(self, graphdef: Any, params: Any) -> None:
        params = rollout_weights(params, self._dtype, self._mesh)
        admit = jax.jit(partial(_admit, graphdef), donate_argnums=0)
        decode = jax.jit(partial(_decode, graphdef, self._stop_ids, self.sizes.chunk), donate_argnums=0)
        rows = self._empty()
        self._ready.set()
        while not self._closing.is_set():
            try:
                rows = self._turn(admit, decode, params, rows)
            except Exception as error:
                log.exception("a step of the engine failed")
                self._fail(error, waiting=False)
                rows = self._empty()

    def _turn(self, admit: Any, decode: Any, params: Any, rows: Rows) -> Rows:
        """Admits what waits, drops what was cancelled, and decodes a chunk."""
        gone = [n for n, job in enumerate(self._jobs) if job and job.cancelled.is_set()]
        if gone:
            rows = replace(rows, done=rows.done | np.isin(np.arange(self.sizes.rows), gone))
            for n in gone:
                self._jobs[n] = None
        idle = not self.busy
        for n, taken in enumerate(self._jobs):
            if taken:
                continue
            try:
                job = self._waiting.get(timeout=IDLE_SECONDS) if idle else self._waiting.get_nowait()
            except queue.Empty:
                break
            idle = False
            if not job.cancelled.is_set():
                self._jobs[n] = job
                rows = admit(rows, params, *self._arguments(n, job.ask))
        if not self.busy:
            return rows
        rows, tokens, written = decode(rows, params)
        self._tell(*jax.device_get((tokens, written, rows.done)))
        return rows

    def _arguments(self, row: int, ask: Ask) -> tuple[Any, ...]:
        batch = collate([[ask.prompt]], self.sizes.tokens, self.sizes.patches)
        start = np.int32(ask.prompt.positions.max() + 1)
        sampling = np.int32(ask.limit), np.uint32(ask.seed), np.float32(ask.temperature), np.float32(ask.top_p)
        return batch, np.int32(row), start, *sampling

    def _tell(self, tokens: np.ndarray, written: np.ndarray, done: np.ndarray) -> None:
        for n, job in enumerate(self._jobs):
            if job is None:
                continue
            new = tokens[n, : written[n]].tolist()
            job.written += len(new)
            reason = None
            if done[n]:
                stopped = bool(new) and bool(np.isin(new[-1], self._stop_ids))
                reason = "stop" if stopped else "length"
                self._jobs[n] = None
            job.tell(new, reason)

    def _fail(self, error: Exception, waiting: bool = True) -> None:
        failed = [job for job in self._jobs if job]
        self._jobs = [None] * self.sizes.rows
        while waiting:
            try:
                failed.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        for job in failed:
            job.tell([], error)

    def _empty(self) -> Rows:
        return jax.jit(_free, static_argnums=(0, 1, 2, 3))(self._text, self.sizes.rows, self._slots(), self._dtype)

    def _slots(self) -> int:
        return self.sizes.tokens[-1] + self.sizes.new_tokens


def _free(text: TextArchitecture, count: int, slots: int, dtype: str) -> Rows:
    """Rows that nobody has taken."""
    return Rows(
        cache=KVCache.empty(text, count, slots, jnp.dtype(dtype)),
        logits=jnp.zeros((count, text.vocab), jnp.float32),
        positions=jnp.zeros(count, jnp.int32),
        at=jnp.zeros(count, jnp.int32),
        limits=jnp.zeros(count, jnp.int32),
        done=jnp.ones(count, bool),
        seeds=jnp.zeros(count, jnp.uint32),
        temperature=jnp.zeros(count, jnp.float32),
        top_p=jnp.ones(count, jnp.float32),
    )


def _admit(
    graphdef: Any,
    rows: Rows,
    params: Any,
    batch: Batch,
    row: jax.Array,
    start: jax.Array,
    limit: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> Rows:
    """The rows with a prompt, a batch of one, in the place `row`; start: the position of its first new token."""
    model = nnx.merge(graphdef, params)
    logits, own = prefill(model, batch, KVCache.empty(model.text.cfg, 1, batch.tokens.shape[1], model.text.dtype))

    def placed(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, (0, row, 0, 0, 0))

    cache = rows.cache
    return Rows(
        cache=replace(
            cache,
            keys=placed(cache.keys, own.keys),
            values=placed(cache.values, own.values),
            lengths=cache.lengths.at[row].set(own.lengths[0]),
        ),
        logits=rows.logits.at[row].set(logits[0]),
        positions=rows.positions.at[row].set(start),
        at=rows.at.at[row].set(0),
        limits=rows.limits.at[row].set(limit),
        done=rows.done.at[row].set(False),
        seeds=rows.seeds.at[row].set(seed),
        temperature=rows.temperature.at[row].set(temperature),
        top_p=rows.top_p.at[row].set(top_p),
    )


def _decode(graphdef: Any, stop_ids: jax.Array, steps: int, rows: Rows, params: Any) -> tuple[Rows, jax.Array, jax.Array]:
    """Decodes until every row is done, at most `steps` tokens: the rows, tokens int32 [B, steps], their count int32 [B]."""
    model = nnx.merge(graphdef, params)
    unrolled = sharding.platform() != "tpu"  # see `sampler.decode`
    layers = model.text.each_layer() if unrolled else None
    if unrolled:
        rows = replace(rows, cache=rows.cache.by_layer())
    count = rows.done.shape[0]
    row_ids, keys = jnp.arange(count), jax.vmap(jax.random.key)(rows.seeds)

    def more(carry):
        step, rows, *_ = carry
        return (step < steps) & ~rows.done.all()

    def body(carry):
        step, rows, tokens, written = carry
        token = sample(rows.logits, jax.vmap(jax.random.fold_in)(keys, rows.at), rows.temperature, rows.top_p)
        active = ~rows.done
        token = jnp.where(active, token, 0)
        logits, cache = model.decode(token, model.angles(rows.positions), active, rows.cache, layers)
        at = rows.at + active
        done = rows.done | jnp.isin(token, stop_ids) & active | (at >= rows.limits)
        rows = replace(rows, cache=cache, logits=logits, positions=rows.positions + active, at=at, done=done)
        return step + 1, rows, tokens.at[row_ids, step].set(token), written + active

    empty = jnp.zeros((count, steps), jnp.int32)
    _, rows, tokens, written = jax.lax.while_loop(more, body, (jnp.int32(0), rows, empty, jnp.zeros(count, jnp.int32)))
    return (replace(rows, cache=rows.cache.stacked()) if unrolled else rows), tokens, written


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token int32 [B] from logits float32 [B, V], each row at its own temperature (0: the most likely) and top_p."""
    log_probs = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0)[:, None])
    share: Any = top_p[:, None]

    def truncated() -> jax.Array:
        return jnp.where(share < 1, nucleus(log_probs, share), log_probs)

    # Sorting a whole vocabulary for every token is left out when nobody asks for it.
    kept = jax.lax.cond((top_p < 1).any(), truncated, lambda: log_probs)
    return jnp.where(temperature > 0, draw(uniform(keys), jnp.exp(kept)), jnp.argmax(logits, axis=-1)).astype(jnp.int32)
