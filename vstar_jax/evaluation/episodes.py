"""Runs two-turn episodes with the policy: look, ask for tools, look again, answer.

Both turns of a batch of episodes run as jitted programs; between them the host reads the decisions, calls the tools and
writes the second turn's input, which is appended to the KV cache at each row's own cursor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vstar_jax.batch import Batch, Example, collate
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.processor import process
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, Prompts, Reply, first_messages, parse_decision, parse_reply, second_messages
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.sampler import Completion, decode, prefill
from vstar_jax.sharding import put_batch


@dataclass(frozen=True)
class Transcript:
    """What the policy wrote in an episode, and what was read from it."""

    turns: tuple[str, str]
    decision: Decision
    reply: Reply


class EpisodeRunner:
    """The policy as a function from episodes to transcripts, `batch_size` at a time on `mesh`."""

    def __init__(self, graphdef: Any, state: Any, chat: Chat, prompts: Prompts, config: Config, mesh: Mesh):
        self.state, self.chat, self.prompts, self.config, self.mesh = state, chat, prompts, config, mesh
        limit, temperature = config.evaluation.max_new_tokens, config.evaluation.temperature
        stop_ids = jnp.asarray(chat.stop_ids, jnp.int32)

        @jax.jit
        def first(state, batch: Batch, positions, keys) -> tuple[Completion, KVCache]:
            model = nnx.merge(graphdef, state)
            rows, length = batch.tokens.shape
            cache = KVCache.empty(model.text.cfg, rows, length + limit, model.text.dtype)
            logits, cache = prefill(model, batch, cache)
            return decode(model, logits, positions, cache, keys, stop_ids, limit=limit, temperature=temperature)

        @jax.jit
        def following(state, batch: Batch, positions, keys, cache: KVCache) -> tuple[Completion, KVCache]:
            model = nnx.merge(graphdef, state)
            cache = cache.grown(batch.tokens.shape[1] + limit)
            logits, cache = prefill(model, batch, cache)
            return decode(model, logits, positions, cache, keys, stop_ids, limit=limit, temperature=temperature)

        self.first, self.following = first, following

    def run(self, episodes: Sequence[Episode], indices: Sequence[int]) -> list[Transcript]:
        """Plays the episodes, at most `batch_size` of them; `indices` seed each episode's own randomness."""
        missing = self.config.evaluation.batch_size - len(episodes)
        padded, numbers = [*episodes, *[episodes[-1]] * missing], [*indices, *[indices[-1]] * missing]
        examples = [self._first_example(episode) for episode in padded]
        with jax.set_mesh(self.mesh):
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(self.config.seed)))(jnp.asarray(numbers))
            turn_keys = [jax.vmap(partial(jax.random.fold_in, data=turn))(keys) for turn in range(2)]
            start = np.asarray([e.positions.max() + 1 for e in examples], np.int32)
            completion, cache = self.first(self.state, self._put(examples), start, turn_keys[0])
            lengths, firsts = jax.device_get(completion.lengths), self._texts(completion)
            decisions = [parse_decision(text) for text in firsts]
            start = start + lengths
            examples = [
                self._second_example(episode, decision, int(at))
                for episode, decision, at in zip(padded, decisions, start, strict=True)
            ]
            start = np.asarray([e.positions.max() + 1 for e in examples], np.int32)
            completion, _ = self.following(self.state, self._put(examples), start, turn_keys[1], cache)
            seconds = self._texts(completion)
        turns = zip(firsts, seconds, decisions, strict=True)
        return [Transcript((a, b), decision, parse_reply(b)) for a, b, decision in turns][: len(episodes)]

    def _first_example(self, episode: Episode) -> Example:
        clip = process(episode.frames, episode.fps, self.config.video)
        return self.chat.encode(first_messages(self.prompts), [clip], add_generation_prompt=True)

    def _second_example(self, episode: Episode, decision: Decision, start: int) -> Example:
        result = episode.tools(decision)
        clips = [] if result.frames is None else [process(result.frames, episode.fps, self.config.video)]
        return self.chat.encode_continuation(second_messages(self.prompts, result, episode.labels), clips, start)

    def _put(self, examples: Sequence[Example]) -> Batch:
        data = self.config.data
        return put_batch(collate([[e] for e in examples], data.tokens, data.patches), self.mesh)

    def _texts(self, completion: Completion) -> list[str]:
        completion = jax.device_get(completion)
        return [self.chat.decode(row[:n]) for row, n in zip(completion.tokens, completion.lengths, strict=True)]
