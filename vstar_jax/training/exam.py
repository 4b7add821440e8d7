"""What StickMotion's base model can do, on fresh draws: the figures of its model card."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vstar_jax.batch import collate
from vstar_jax.config import VideoConfig
from vstar_jax.data.chat import Chat
from vstar_jax.data.processor import process
from vstar_jax.data.stick_motion import pretraining, render
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.sampler import decode, prefill
from vstar_jax.sharding import put_batch

QUESTIONS = 96
"""Asked of each kind."""
SEED = 20_000
"""Far from the seeds of any training draw."""
TOKENS, LIMIT = 160, 128


def examine(model: Qwen25VL, chat: Chat, video: VideoConfig, mesh: Mesh) -> dict[str, float]:
    """Kind of question -> share of greedy replies that are right: all moves of a clip, or the last name of a look-up."""
    return {
        **{f"clips of {n} moves": _share(model, chat, mesh, _watching(chat, video, n), str.__eq__) for n in (1, 2, 3)},
        **{f"look-ups among {n} names": _share(model, chat, mesh, _reading(chat, n), _same_end) for n in (2, 4, 8)},
    }


def _watching(chat: Chat, video: VideoConfig, length: int) -> list[tuple[Any, str]]:
    drawn = [pretraining.draw_clip((SEED, length, i), length) for i in range(QUESTIONS)]
    clips = [process(frames, render.FPS, video) for frames, _ in drawn]
    question = [pretraining.user(*pretraining.NAME_THE_MOVES)]
    examples = (chat.encode(question, [clip], add_generation_prompt=True) for clip in clips)
    return [(example, pretraining.named(moves)) for example, (_, moves) in zip(examples, drawn, strict=True)]


def _reading(chat: Chat, count: int) -> list[tuple[Any, str]]:
    drawn = (pretraining.lookup_texts(np.random.default_rng((SEED, count, i)), count) for i in range(QUESTIONS))
    return [
        (chat.encode([pretraining.user({"type": "text", "text": question})], add_generation_prompt=True), reply)
        for question, reply in drawn
    ]


def _same_end(told: str, expected: str) -> bool:
    return told.split()[-2:] == expected.split()[-2:]


def _share(
    model: Qwen25VL, chat: Chat, mesh: Mesh, asked: Sequence[tuple[Any, str]], right: Callable[[str, str], bool]
) -> float:
    batch = collate([[example] for example, _ in asked], (TOKENS,), (128,))
    start = np.asarray([example.positions.max() + 1 for example, _ in asked], np.int32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def reply(state, batch, start, keys):
        model = nnx.merge(graphdef, state)
        cache = KVCache.empty(model.text.cfg, len(asked), TOKENS + LIMIT, model.text.dtype)
        logits, cache = prefill(model, batch, cache)
        return decode(model, logits, start, cache, keys, jnp.asarray(chat.stop_ids), limit=LIMIT, temperature=0.0)[0]

    with jax.set_mesh(mesh):
        done = jax.device_get(reply(state, put_batch(batch, mesh), start, jax.random.split(jax.random.key(0), len(asked))))
    told = [chat.decode(row[:length]) for row, length in zip(done.tokens, done.lengths, strict=True)]
    return float(np.mean([right(text, expected) for text, (_, expected) in zip(told, asked, strict=True)]))
