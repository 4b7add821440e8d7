"""The programs of a run lower for a GPU that is not there: their shapes and types are those that cuDNN's kernels take.

Lowering is all that a machine without a GPU can do: it checks what JAX checks of a kernel's arguments, and runs nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import Mesh

from vstar_jax import sharding
from vstar_jax.config import parse
from vstar_jax.models.attention import attention, attention_cached
from vstar_jax.rollout import episode
from vstar_jax.scaling import programs

KERNEL = "__cudnn$fmha"
IRREGULAR = "--video.max_pixels=40000"
"""Frames of 168 x 224 pixels: windows at their right and lower edges are smaller, so that groups go by an index."""
SMALL = (
    *("--data.tokens=[256,448]", "--data.patches=[1536,3072]", "--sft.batch_size=2", "--sft.chunk=64"),
    *("--grpo.prompts=2", "--grpo.group=2", "--grpo.accumulate=2", "--grpo.chunk=64"),
    *("--rollout.max_new_tokens=[8,16]", "--rollout.turn_tokens=256", "--policy.dtype=bfloat16"),
)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had a Hopper with cuDNN 9.10."""
    monkeypatch.setattr(sharding, "platform", lambda: "cuda")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def lowered(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


CASES: dict[str, tuple[Callable[..., jax.Array], tuple[jax.ShapeDtypeStruct, ...]]] = {
    "causal": (lambda q, k, v: attention(q, k, v, causal=True), ()),
    "packed": (lambda q, k, v, ids: attention(q, k, v, causal=True, segments=ids), (shape(2, 64, dtype=jnp.int32),)),
    "whole groups": (lambda q, k, v: attention(q, k, v), ()),
    "groups with empty slots": (lambda q, k, v, n: attention(q, k, v, lengths=n), (shape(2, dtype=jnp.int32),)),
}


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)], ids=["grouped", "KV head each"])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradient_are_kernels_of_cudnn(case: str, heads: tuple[int, int]):
    function, masks = CASES[case]
    q, k = shape(2, 64, heads[0], 80), shape(2, 64, heads[1], 80)
    assert lowered(function, q, k, k, *masks).count(KERNEL) >= 1
    gradient = jax.grad(lambda q, *rest: function(q, *rest).astype(jnp.float32).sum())
    assert lowered(gradient, q, k, k, *masks).count(KERNEL) >= 2


@pytest.mark.parametrize(("devices", "kernel"), [("8x1", "2x64x4x80"), ("4x2", "4x64x2x80"), ("2x4", "8x64x1x80")])
def test_every_device_computes_its_own_rows_and_heads_alone(devices: str, kernel: str, mesh: Callable[[str], Mesh]):
    """Also where there are fewer KV heads than devices along the model axis; and in the gradient, which was not so."""
    q, k, lengths = shape(16, 64, 4, 80), shape(16, 64, 2, 80), shape(16, dtype=jnp.int32)
    gradient = jax.grad(lambda q, k, v, n: attention(q, k, v, lengths=n).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with jax.set_mesh(mesh(devices)):
        text = lowered(gradient, q, k, k, lengths)
    calls = [line for line in text.splitlines() if KERNEL in line]
    assert len(calls) == 2
    assert all(f"tensor<{kernel}xbf16>" in line for line in calls)


def test_a_prompt_is_prefilled_by_a_kernel_of_cudnn():
    q, k, v = shape(2, 64, 4, 80), shape(2, 2, 80, 96), shape(2, 2, 96, 80)
    assert KERNEL in lowered(attention_cached, q, k, v, shape(2, 64, dtype=jnp.int32))


def unasked(_: Any, shapes: Any, *arguments: jax.Array, ordered: bool) -> Any:
    """In the place of a callback, which is lowered for a device that is there and no other."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@pytest.mark.parametrize("what", programs.WHATS)
def test_the_programs_of_a_run_lower_for_a_gpu(what: str, mesh: Callable[[str], Mesh], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(episode, "io_callback", unasked)
    config = parse([*SMALL, IRREGULAR], programs.paper("tiny"))
    one = mesh("1x1")
    for program in programs.programs(config, programs.architecture_of("tiny"), one, what):
        with jax.set_mesh(one):
            text = program.function.trace(*program.arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert KERNEL in text, program.name
