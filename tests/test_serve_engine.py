"""The engine by itself: what it serves is what the sampler of the rollouts writes, and a lost row hurts nobody else."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from policy_servers import MODEL, ROOT

from vstar_jax.batch import Batch, Example, collate
from vstar_jax.config import PolicyConfig, VideoConfig
from vstar_jax.data.chat import Chat
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.sampler import Completion, decode, prefill
from vstar_jax.serving.engine import Ask, Busy, Engine, Job, Sizes
from vstar_jax.serving.text import Text

PATH = ROOT / "vstar_jax" / "assets" / MODEL
SIZES = Sizes(rows=2, chunk=4, new_tokens=24, queue=3, tokens=(64, 128), patches=(128,))


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(PATH, VideoConfig())


@pytest.fixture(scope="module")
def model(mesh: Callable[[str], Mesh]) -> Any:
    return hf.load(PATH, PolicyConfig(), mesh("1x1"))


@pytest.fixture
def engine(model: Any, chat: Chat, mesh: Callable[[str], Mesh]) -> Iterator[Engine]:
    made = Engine(lambda: nnx.split(model), Architecture.from_hf(PATH), "float32", chat.stop_ids, SIZES, mesh("1x1"))
    yield made
    made.close()


def prompt(chat: Chat, shade: int) -> Example:
    frames = np.full((4, 56, 56, 3), shade, np.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which of these is it?"}]}]
    return chat.encode(messages, [chat.clip(frames, 2.0)], add_generation_prompt=True)


class Heard:
    """What a job was told; done: set at its end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: Any = None
        self.done = threading.Event()

    def __call__(self, ids: list[int], end: Any) -> None:
        self.tokens += ids
        self.end = end
        if end is not None:
            self.done.set()


def submit(engine: Engine, example: Example, limit: int = 24, temperature: float = 0.0, seed: int = 0) -> tuple[Job, Heard]:
    heard = Heard()
    job = Job(Ask(example, limit, temperature, 1.0, seed), heard)
    engine.submit(job)
    return job, heard


def test_a_greedy_reply_is_the_samplers(engine: Engine, model: Any, chat: Chat) -> None:
    engine.start(lambda error: None)
    graphdef, params = nnx.split(model)

    @jax.jit
    def reference(params: Any, batch: Batch, start: jax.Array) -> Completion:
        model = nnx.merge(graphdef, params)
        logits, cache = prefill(model, batch, KVCache.empty(model.text.cfg, 1, 160, jnp.float32))
        keys = jax.random.split(jax.random.key(0), 1)
        return decode(model, logits, start, cache, keys, jnp.asarray(chat.stop_ids), limit=24, temperature=0.0)[0]

    shades = (0, 90, 255)
    replies = [submit(engine, prompt(chat, shade))[1] for shade in shades]
    for shade, heard in zip(shades, replies, strict=True):
        assert heard.done.wait(120)
        example = prompt(chat, shade)
        batch = collate([[example]], (128,), (128,))
        wanted = reference(params, batch, np.asarray([example.positions.max() + 1], np.int32))
        assert heard.tokens == np.asarray(wanted.tokens[0, : wanted.lengths[0]]).tolist()
        assert heard.end == ("stop" if heard.tokens[-1] in chat.stop_ids else "length")


def test_a_full_queue_is_told_and_a_closed_engine_tells_everybody(engine: Engine, chat: Chat) -> None:
    waiting = [submit(engine, prompt(chat, 0))[1] for _ in range(SIZES.queue)]
    with pytest.raises(Busy):
        submit(engine, prompt(chat, 0))
    engine._closing.set()
    engine.start(lambda error: None)
    for heard in waiting:
        assert heard.done.wait(60)
        assert isinstance(heard.end, Exception)


def test_a_cancelled_job_leaves_its_row_to_others(engine: Engine, chat: Chat) -> None:
    cancelled = [submit(engine, prompt(chat, 0))[0] for _ in range(SIZES.queue)]
    for job in cancelled:
        job.cancelled.set()
    engine.start(lambda error: None)
    while engine.waiting:
        assert engine._thread.is_alive()
    _, heard = submit(engine, prompt(chat, 0), limit=5)
    assert heard.done.wait(60)
    assert len(heard.tokens) <= 5
    assert engine.busy == 0


def test_a_caller_that_leaves_in_the_middle_is_written_no_more(engine: Engine, chat: Chat) -> None:
    heard = Heard()
    job = Job(Ask(prompt(chat, 0), 24, 5.0, 1.0, 3), lambda ids, end: (heard(ids, end), job.cancelled.set()))
    engine.submit(job)
    engine.start(lambda error: None)
    _, other = submit(engine, prompt(chat, 0), temperature=5.0, seed=3)
    assert other.done.wait(60)
    assert len(other.tokens) > SIZES.chunk
    assert heard.tokens == other.tokens[: SIZES.chunk]
    assert heard.end is None


def test_a_model_that_cannot_be_loaded_is_told(chat: Chat, mesh: Callable[[str], Mesh]) -> None:
    def fail() -> Any:
        raise OSError("no such file")

    told: list[Exception] = []
    broken = Engine(fail, Architecture.from_hf(PATH), "float32", chat.stop_ids, SIZES, mesh("1x1"))
    broken.start(told.append)
    broken.close()
    assert isinstance(told[0], OSError)
    assert not broken.ready


def test_text_is_given_out_in_whole_characters_and_never_begins_a_stop_text() -> None:
    words = ["a", "b ST", "O", "X", " \ufffd", "é S", "TOP", "never"]
    pieces = {n: "".join(words[: n + 1]) for n in range(len(words))}
    pieces[4] = "ab STOX \ufffd"
    for n in range(5, len(words)):
        pieces[n] = "ab STOX " + "".join(words[5 : n + 1])
    text = Text(lambda ids: pieces[ids[-1]], ("STOP",))
    given = [text.add([n]) for n in range(len(words))]
    assert given == ["a", "b ", "", "STOX", " ", "é ", "", ""]
    assert text.stopped
    assert text.text == "ab STOX é "
