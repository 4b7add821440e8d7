"""What the device can do at best, measured where and when the work is: its matrix rate and its memory's bandwidth."""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

REPEATS = 5
CHAINED = 4
"""Products or copies of one call, which hide what a call costs."""


def matrix_rate(dtype: str) -> float:
    """Operations a second of a product of two square matrices of random numbers, the best of several calls.

    8192 wide on an accelerator and 1024 on a CPU; float32 in the precision that the model's own products have.
    """
    width = 1024 if jax.default_backend() == "cpu" else 8192
    x, y = (jax.random.normal(key, (width, width), jnp.dtype(dtype)) for key in jax.random.split(jax.random.key(0)))
    y = y * width**-0.5  # so that a chain of products neither grows nor vanishes

    @jax.jit
    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, CHAINED, lambda _, x: x @ y, x)

    return CHAINED * 2.0 * width**3 / _best(partial(chain, x, y))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of an array far larger than any cache that is read and written back; the best of
    several calls.
    """
    size = (1 << 28) if jax.default_backend() == "cpu" else (1 << 31)

    @partial(jax.jit, donate_argnums=0)
    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, CHAINED, lambda _, x: ~x, x)  # inverted, so that no copy can be left out

    lying = [jax.lax.iota(jnp.uint32, size // 4)]

    def call() -> jax.Array:
        lying[0] = copies(lying[0])
        return lying[0]

    return CHAINED * 2.0 * size / _best(call)


def _best(call: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
