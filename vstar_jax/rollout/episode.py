"""Episodes of several turns: the policy writes, the host answers with the next turn's input, the policy goes on.

The prompt of a group is encoded and prefilled once, and its G members continue it, each in a cache of its own. Two drivers
run the same kernels: `callback` is one jitted program that calls the host in its middle, `segmented` returns to Python
after every turn. They give the same tokens; the second is the oracle, and the way where callbacks are not supported.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from vstar_jax.batch import Batch, Turn, Vision
from vstar_jax.config import CacheDType
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.models.text import KVCache
from vstar_jax.rollout.sampler import Completion, decode, prefill
from vstar_jax.sharding import ROWS, fetch_batch, put_batch, row_devices

Mode = Literal["callback", "segmented"]
History = Literal["append", "replace"]
PHASES = ("encode", "prefill", "decode", "tools")

Host = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Turn]
"""(turn, episodes int32 [b], tokens int32 [b, M], lengths int32 [b], positions int32 [b]) -> Turn of numpy arrays.

turn counts the replies so far; episodes are the numbers that the caller gave; lengths and positions are of the reply and of
what follows it. It must not raise, must not call JAX, and must return in bounded time; JAX may call it again for the same
episodes and turn, for the shards of a mesh at once, and in any order.
"""


@dataclass(frozen=True)
class Sampling:
    """limits: most tokens of each reply, the last for all later ones; temperature: 0 is greedy; top_p: see `sampler.decode`;
    turns: replies of an episode.
    """

    limits: tuple[int, ...]
    temperature: float
    top_p: float = 1.0
    turns: int = 2

    def limit(self, turn: int) -> int:
        """Most tokens of reply `turn`, counted from 0."""
        return self.limits[min(turn, len(self.limits) - 1)]

    @property
    def tokens(self) -> int:
        """Most tokens that the policy writes in an episode."""
        return sum(self.limit(turn) for turn in range(self.turns))


class Rollout:
    """The policy as a function from prompts to the replies of G episodes each.

    seconds: how long each phase of the last rollout took, of all turns together: encode (pictures), prefill, decode, tools.
    """

    def __init__(
        self,
        graphdef: Any,
        host: Host,
        turn_tokens: int,
        stop_ids: np.ndarray,
        sampling: Sampling,
        mesh: Mesh,
        mode: Mode,
        history: History = "append",
        cache_dtype: CacheDType = "same",
    ):
        """graphdef: the policy's; host: see `Host`; turn_tokens: tokens S of the input of a later turn; stop_ids int32 [n];
        history: whether a later turn goes on after what was before, or forgets it; cache_dtype: of keys and values.
        """
        self.host, self.mesh, self.mode, self.sampling = host, mesh, mode, sampling
        self.seconds: dict[str, float] = {}
        self._marks: list[tuple[float, str]] = []
        stops = jnp.asarray(stop_ids, jnp.int32)

        def empty(model: Qwen25VL, rows: int, slots: int) -> KVCache:
            dtype = model.text.dtype if cache_dtype == "same" else jnp.dtype(cache_dtype)
            return KVCache.empty(model.text.cfg, rows, slots, dtype)

        def encode(state, vision: Vision):
            return nnx.merge(graphdef, state).encode(vision)

        def prompts(state, batch: Batch, visual):
            model = nnx.merge(graphdef, state)
            rows, length = batch.tokens.shape
            return prefill(model, batch, empty(model, rows, length), visual)

        def turn(state, batch: Batch, visual, cache: KVCache, number: int):
            model = nnx.merge(graphdef, state)
            rows, length = batch.tokens.shape
            if history == "append":
                cache = cache.grown(length + sampling.limit(number))
            else:
                cache = empty(model, rows, length + sampling.limit(number))
            return prefill(model, batch, cache, visual)

        def begun(state, logits, positions, prefix: KVCache, keys):
            members = keys.shape[0] // logits.shape[0]
            logits, positions = (jnp.repeat(x, members, axis=0) for x in (logits, positions))
            cache = prefix.shared(members, sampling.limit(0))
            return reply(state, logits, positions, cache, keys, 0, jnp.ones(len(keys), bool))

        def reply(state, logits, positions, cache, keys, number: int, active) -> tuple[Completion, jax.Array, KVCache]:
            completion, cache = decode(
                nnx.merge(graphdef, state),
                logits,
                positions,
                cache,
                jax.vmap(jax.random.fold_in, (0, None))(keys, number),
                stops,
                limit=sampling.limit(number),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                active=active,
            )
            return completion, positions + completion.lengths, cache

        def episodes(do: Callable, ask: Callable, state, batch: Batch, positions, keys, numbers) -> list[Completion]:
            """Both drivers; do(phase, function, ...) calls a part, ask(number, ...) the host."""
            visual = None if batch.vision is None else do("encode", encode, state, batch.vision)
            logits, cache = do("prefill", prompts, state, batch, visual)
            completion, positions, cache = do("decode", begun, state, logits, positions, cache, keys)
            completions = [completion]
            for number in range(1, sampling.turns):
                given: Turn = do("tools", ask, number, numbers, completion, positions)
                visual = None if given.batch.vision is None else do("encode", encode, state, given.batch.vision)
                logits, cache = do("prefill", turn, state, given.batch, visual, cache, number)
                completion, positions, cache = do(
                    "decode", reply, state, logits, given.positions, cache, keys, number, given.active
                )
                completions.append(completion)
            return completions

        def whole(state, batch: Batch, positions, keys, numbers):
            def do(phase: str, function: Callable, *arguments):
                result = function(*arguments)
                if phase in ("encode", "prefill"):
                    # A scalar of what a part gives tells that the part is over; the host tells so of decoding, and of itself.
                    first = jax.tree.leaves(result)[0]
                    io_callback(partial(self._mark, phase), None, first[(0,) * first.ndim], ordered=False)
                return result

            shapes = turn_shapes(batch, turn_tokens)
            return episodes(do, partial(ask, self._timed, shapes), state, batch, positions, keys, numbers)

        jitted: dict[Callable, Any] = {f: jax.jit(f) for f in (encode, prompts, begun)}
        jitted[turn] = jax.jit(turn, static_argnames="number")
        jitted[reply] = jax.jit(reply, static_argnames="number", donate_argnames="cache")

        def segmented(*arguments):
            def do(phase: str, function: Callable, *arguments):
                result = jax.block_until_ready(jitted.get(function, function)(*arguments))
                self._mark(phase)
                return result

            return episodes(do, self._asked, *arguments)

        self._programs: list[Any] = list(jitted.values()) if mode == "segmented" else [jax.jit(whole)]
        self.play = self._programs[0] if mode == "callback" else segmented

    def __call__(
        self, state: Any, batch: Batch, positions: np.ndarray, keys: jax.Array, episodes: np.ndarray
    ) -> list[Completion]:
        """The replies of every turn, as arrays [B, M] on the device.

        state: the policy's; batch: prompts on the mesh, one a group. Of this process's rows: positions int32 [B / G] of the
        first new token; keys [B], one an episode; episodes int32 [B], the numbers by which the host knows them. Members of a
        group stand side by side.
        """
        with jax.set_mesh(self.mesh):
            positions, episodes, keys = (put_batch(x, self.mesh) for x in (positions, episodes, jax.random.key_data(keys)))
            keys = jax.random.wrap_key_data(keys)
            self._marks = [(time.perf_counter(), "")]
            completions = jax.block_until_ready(self.play(state, batch, positions, keys, episodes))
            jax.effects_barrier()
            self._mark("decode")
        self.seconds = dict.fromkeys(PHASES, 0.0)
        for (before, _), (after, phase) in itertools.pairwise(sorted(self._marks)):
            self.seconds[phase] += after - before
        return completions

    def compilations(self) -> int:
        """How many programs were compiled: one of each, as long as the shapes stay."""
        return sum(program._cache_size() for program in self._programs)

    def _mark(self, phase: str, _: Any = None) -> None:
        self._marks.append((time.perf_counter(), phase))

    def _timed(self, *arguments: Any) -> Turn:
        """The host; shards come at once, and decoding is over when the last one has come."""
        self._mark("decode")
        turn = self.host(*arguments)
        self._mark("tools")
        return turn

    def _asked(self, number: int, episodes: jax.Array, completion: Completion, positions: jax.Array) -> Turn:
        arguments = fetch_batch((episodes, completion.tokens, completion.lengths, positions), self.mesh)
        return put_batch(self.host(number, *arguments), self.mesh)


def turn_shapes(prompts: Batch, tokens: int) -> Turn:
    """The shapes and types of a turn's input, with a leading axis of any length: pictures are laid out as in the prompts."""

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    batch = Batch(
        tokens=rows(jnp.int32, tokens),
        positions=rows(jnp.int32, tokens, 3),
        segments=rows(jnp.int32, tokens),
        loss_mask=rows(bool, tokens),
        visual_index=rows(jnp.int32, tokens),
        vision=jax.tree.map(lambda x: rows(x.dtype, *x.shape[1:]), prompts.vision),
    )
    return Turn(batch, rows(jnp.int32), rows(bool))


def ask(host: Host, like: Turn, number: int, episodes: jax.Array, completion: Completion, positions: jax.Array) -> Turn:
    """Calls the host once for every shard of the batch, in the middle of a jitted program; like: see `turn_shapes`.

    A callback under `shard_map` runs on every device: the replicas along the model axis are kept from it by a branch, in which
    no collective may stand, and get the answer by a sum of which theirs is zero.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = episodes.shape[0] // row_devices(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), like)

    # A row of each is one axis: lowered for TPU under shard_map, the results of a callback must all be of one rank.
    flat = jax.tree.map(lambda s: jax.ShapeDtypeStruct((rows, math.prod(s.shape[1:])), s.dtype), shapes)

    def call(episodes, tokens, lengths, positions) -> Turn:
        turn = host(number, *(np.asarray(x) for x in (episodes, tokens, lengths, positions)))
        return jax.tree.map(lambda x, s: np.asarray(x, s.dtype).reshape(s.shape), turn, flat)

    def local(*arguments: jax.Array) -> Turn:
        answer = jax.lax.cond(
            jax.lax.axis_index("model") == 0,
            lambda *a: io_callback(call, flat, *a, ordered=False),
            lambda *a: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), flat),
            *arguments,
        )
        answer = jax.tree.map(lambda x, s: x.reshape(s.shape), answer, shapes)
        return jax.tree.map(lambda x: jax.lax.psum(x, "model") if x.dtype != bool else jax.lax.pmax(x, "model"), answer)

    by_row = PartitionSpec(ROWS)
    arguments = (episodes, completion.tokens, completion.lengths, positions)
    return jax.shard_map(local, in_specs=(by_row,) * 4, out_specs=by_row, check_vma=False)(*arguments)


def episode_keys(seed: int, prompts: Sequence[int], members: int) -> jax.Array:
    """Keys [B] that depend on the seed, the prompt's number and the member alone, so that rows may be batched in any way."""
    key = jax.random.key(seed)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    by_prompt = fold(key, jnp.asarray(prompts))
    return jax.vmap(fold, (0, None))(by_prompt, jnp.arange(members)).reshape(-1)
