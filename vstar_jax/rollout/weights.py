"""The weights that a rollout reads for every token: a copy in the type that the policy computes in, whole along data.

Training keeps parameters split over data and in a type to be updated in. Read as they lie, each decoded token would gather
all of them from the other devices and read every number at its full length; one copy for the length of a rollout does both
once. Every layer casts what it reads to that type anyway, so that the copy changes no number.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vstar_jax.sharding import state_shardings


def rollout_weights(state: Any, dtype: str, mesh: Mesh) -> Any:
    """The NNX state of a policy in `dtype` and whole along data; what is so already is not copied.

    The copy is of the parameters' values now: make it anew after an update, and let go of it before. A state of shapes gives
    one of shapes.
    """
    return jax.tree.map(lambda x, to: _copy(x, jnp.dtype(dtype), to), state, state_shardings(state, mesh, fsdp=False))


def _copy(x: Any, dtype: Any, layout: NamedSharding) -> Any:
    if x.dtype == dtype and x.sharding.is_equivalent_to(layout, len(x.shape)):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=layout)
    return gather(dtype, x.sharding, layout)(x)


@cache
def gather(dtype: Any, split: NamedSharding, layout: NamedSharding) -> Any:
    """The jitted function from an array that is split so to its copy in `dtype`, laid out by `layout`.

    One array a program, since XLA on TPU needs as much again as what it gathers: in one program for all that is all at once.
    """

    def copied(x: jax.Array) -> jax.Array:
        # Converted where it lies, so that what is sent is short already.
        return jax.lax.with_sharding_constraint(x.astype(dtype), split)

    return jax.jit(copied, out_shardings=layout)
