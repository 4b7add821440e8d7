"""Every mesh computes what one device computes, parameters are really split, and the collectives are the ones meant.

The train step runs with an optimizer that only records the gradient, so one compiled program a mesh gives loss, gradients,
bytes and collectives.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import dialogues as d
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from vstar_jax.batch import Batch, collate
from vstar_jax.config import LoraConfig, PolicyConfig, SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models.qwen2_5_vl import check_mesh, create
from vstar_jax.sharding import batch_sharding, constrain, make_mesh, mesh_shape, put_batch, state_shardings
from vstar_jax.training.state import create_state, make_train_step

TOLERANCE = 1e-5  # relative, float32: devices add the same numbers up in another order
BF16_TOLERANCE = 2e-2  # bfloat16 keeps 8 bits, and a loss averages over many roundings

TOKENS, CHUNK = 24, 8
MESHES = ("8x1", "4x2", "2x4", "1x8", "2x4x1", "2x2x2")

SPLIT = {
    "text.embedding": ("model", "data"),
    "text.layers.q_proj.kernel": (None, "data", "model", None),
    "text.layers.q_proj.bias": (None, "model", None),
    "text.layers.k_proj.kernel": (None, "data", "model", None),
    "text.layers.k_proj.bias": (None, "model", None),
    "text.layers.v_proj.kernel": (None, "data", "model", None),
    "text.layers.v_proj.bias": (None, "model", None),
    "text.layers.o_proj.kernel": (None, "model", None, "data"),
    "text.layers.mlp.gate_proj.kernel": (None, "data", "model"),
    "text.layers.mlp.up_proj.kernel": (None, "data", "model"),
    "text.layers.mlp.down_proj.kernel": (None, "model", "data"),
    "visual.patch_embed.kernel": (None, "data"),
    "visual.blocks.qkv.kernel": (None, "data", None, "model", None),
    "visual.blocks.qkv.bias": (None, None, "model", None),
    "visual.blocks.proj.kernel": (None, "model", None, "data"),
    "visual.blocks.proj.bias": (None, "data"),
    "visual.blocks.mlp.gate_proj.kernel": (None, "data", "model"),
    "visual.blocks.mlp.gate_proj.bias": (None, "model"),
    "visual.blocks.mlp.up_proj.kernel": (None, "data", "model"),
    "visual.blocks.mlp.up_proj.bias": (None, "model"),
    "visual.blocks.mlp.down_proj.kernel": (None, "model", "data"),
    "visual.blocks.mlp.down_proj.bias": (None, "data"),
    "visual.merger_in.kernel": ("data", "model"),
    "visual.merger_in.bias": ("model",),
    "visual.merger_out.kernel": ("model", "data"),
    "visual.merger_out.bias": ("data",),
}
"""Which axis splits which dimension; what is not here (norms) is whole everywhere."""

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
KV = re.compile(r"text\.layers\.[kv]_proj")


@dataclass(frozen=True)
class Result:
    """One train step on one mesh: losses, gradients on the host, and the compiled program."""

    loss: float
    gradients: dict[str, np.ndarray]
    params: dict[str, jax.Array]
    held: int
    argument_bytes: int
    hlo: str


@cache
def model_and_batch(policy: PolicyConfig) -> tuple[Any, Any, Batch]:
    rng = np.random.default_rng(0)
    rows = [[d.dialogue(rng, 3, d.clip(rng, "video", 2, 4, 4), 3 + row).example] for row in range(8)]
    graphdef, weights = nnx.split(create(d.ARCHITECTURE, policy, 0))
    # On the host, since a train step donates what it is given.
    return graphdef, jax.device_get(weights), collate(rows, (TOKENS,), (32,))


def flat(state: Any) -> dict[str, Any]:
    return {".".join(map(str, key)): variable.get_value() for key, variable in nnx.to_flat_state(state)}


@cache
def step_on(mesh_text: str, policy: PolicyConfig = PolicyConfig(), accumulate: int = 1) -> Result:  # noqa: B008 (frozen)
    graphdef, weights, batch = model_and_batch(policy)
    mesh = make_mesh(mesh_text)
    with jax.set_mesh(mesh):
        model = nnx.merge(graphdef, jax.device_put(weights, state_shardings(weights, mesh)))
        optimizer = optax.trace(decay=0.0)
        graphdef, state = create_state(model, optimizer, LoraConfig(), mesh, 0)
        step = make_train_step(graphdef, optimizer, SftConfig(chunk=CHUNK, accumulate=accumulate), False, state)
        placed = put_batch(batch, mesh)
        compiled = step.lower(state, placed).compile()
        params = flat(state.params)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.optimizer, placed)))
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in params.items()}
        state, metrics = compiled(state, placed)
    gradients = {name: np.asarray(x, np.float32) for name, x in flat(state.optimizer.trace).items()}
    return Result(
        float(metrics["sft/loss"]),
        gradients,
        shapes,
        held,
        compiled.memory_analysis().argument_size_in_bytes,
        compiled.as_text(),
    )


def collectives(hlo: str) -> Iterator[tuple[str, int, str]]:
    """(kind, devices in a group, result) of every collective that crosses devices, in the notations that XLA prints."""
    for line in hlo.splitlines():
        found = COLLECTIVE.search(line)
        if not found:
            continue
        if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            size = int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2])]))
        elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
            size = int(iota[1])
        elif listed := re.search(r"replica_groups=\{\{(.*?)\}", line):
            size = listed[1].count(",") + 1
        else:
            size = 0
        yield found[2], size, found[1]


def assert_close(gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert gradients.keys() == expected.keys()
    for name, want in expected.items():
        error = np.linalg.norm(gradients[name] - want) / np.linalg.norm(want)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_equal_those_of_one_device(mesh):
    one, many = step_on("1x1"), step_on(mesh)
    assert many.loss == pytest.approx(one.loss, rel=TOLERANCE)
    assert_close(many.gradients, one.gradients, TOLERANCE)


def test_every_parameter_has_a_gradient():
    """Else the comparison above would hold of parameters that nothing reaches."""
    for name, gradient in step_on("1x1").gradients.items():
        assert np.linalg.norm(gradient) > 0, name


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_split_as_the_table_says(mesh):
    _, data, model = mesh_shape(mesh)
    params = step_on(mesh).params
    assert params.keys() >= SPLIT.keys()
    for name, array in params.items():
        axes = SPLIT.get(name, ())
        if KV.match(name) and d.ARCHITECTURE.text.kv_heads % model:
            axes = tuple(None if axis == "model" else axis for axis in axes)
        assert array.sharding.is_equivalent_to(
            jax.NamedSharding(array.sharding.mesh, PartitionSpec(*axes)), len(array.shape)
        ), (name, array.sharding.spec)
        parts = np.prod([{"data": data, "model": model}[axis] for axis in axes if axis])
        assert np.prod(array.sharding.shard_shape(array.shape)) * parts == np.prod(array.shape), name


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_holds_its_part_of_the_bytes_and_no_more(mesh):
    """The compiled program's own account: parameters, optimizer state and batch on one device."""
    one, many = step_on("1x1"), step_on(mesh)
    assert many.argument_bytes == pytest.approx(many.held, rel=0.01)
    model = mesh_shape(mesh)[-1]
    # Tensor parallelism alone keeps the batch and this tiny model's patch embedding whole, and replicas keep parameters;
    # FSDP splits nearly everything.
    whole = model > 1 or mesh_shape(mesh)[0] > 1
    assert many.argument_bytes < one.argument_bytes * (0.5 if whole else 1.1 / 8)


def test_one_device_needs_no_collective():
    assert list(collectives(step_on("1x1").hlo)) == []


def parameter_shapes() -> set[tuple[int, ...]]:
    """Shapes of parameters and of their layers, up to the order of axes."""
    shapes = [array.shape for array in step_on("1x1").params.values()]
    return {tuple(sorted(s)) for shape in shapes for s in (shape, shape[1:])}


def gathered(hlo: str) -> list[tuple[int, ...]]:
    """Shapes of the float arrays that all-gathers put together."""
    results = [result for kind, _, result in collectives(hlo) if kind == "all-gather"]
    return [tuple(map(int, dims.split(","))) for r in results for dims in re.findall(r"f32\[([\d,]+)\]", r)]


def test_fsdp_gathers_parameters_and_nothing_else_and_sums_gradients():
    hlo = step_on("8x1").hlo
    kinds = {(kind, size) for kind, size, _ in collectives(hlo)}
    assert ("all-gather", 8) in kinds
    assert kinds & {("all-reduce", 8), ("reduce-scatter", 8)}
    assert {tuple(sorted(shape)) for shape in gathered(hlo)} <= parameter_shapes()


def test_tensor_parallelism_sums_activations_and_gathers_no_parameter():
    hlo = step_on("1x8").hlo
    assert ("all-reduce", 8) in {(kind, size) for kind, size, _ in collectives(hlo)}
    assert not {tuple(sorted(shape)) for shape in gathered(hlo)} & {s for s in parameter_shapes() if len(s) > 1}


@pytest.mark.parametrize("mesh", ["4x2", "2x4"])
def test_a_mixed_mesh_gathers_over_data_and_sums_over_both(mesh):
    _, data, model = mesh_shape(mesh)
    kinds = {(kind, size) for kind, size, _ in collectives(step_on(mesh).hlo)}
    assert ("all-gather", data) in kinds
    assert ("all-reduce", model) in kinds
    assert kinds & {("all-reduce", data), ("reduce-scatter", data)}


def test_the_vocabulary_is_gathered_and_its_gradient_summed_outside_the_loop_over_chunks():
    """Inside, the largest parameter would cross the network once a chunk."""
    architecture = d.ARCHITECTURE.text
    assert CHUNK < TOKENS  # there is a loop
    for mesh in ("8x1", "4x2", "2x4"):
        vocab = architecture.vocab // mesh_shape(mesh)[-1]
        lines = [line for line in step_on(mesh).hlo.splitlines() if COLLECTIVE.search(line)]
        large = [line for line in lines if f"f32[{vocab},{architecture.hidden}]" in line]
        assert large
        assert not [line for line in large if "/while/body" in line]


def test_each_device_keeps_its_part_of_the_vocabularys_gradient():
    """By a reduce-scatter: an all-reduce would send twice as much, and hold the whole gradient once more."""
    vocab, width = d.ARCHITECTURE.text.vocab, d.ARCHITECTURE.text.hidden
    found = list(collectives(step_on("8x1").hlo))
    assert [size for kind, size, result in found if kind == "reduce-scatter" and f"f32[{vocab},{width // 8}]" in result]
    assert not [kind for kind, _, result in found if kind == "all-reduce" and f"f32[{vocab},{width}]" in result]


def test_replicas_gather_nothing_from_each_other():
    """Parameters are gathered along data, and only their gradients' parts are summed over replicas."""
    vocab, width = d.ARCHITECTURE.text.vocab, d.ARCHITECTURE.text.hidden
    found = list(collectives(step_on("2x4x1").hlo))
    assert {size for kind, size, _ in found if kind in ("all-gather", "reduce-scatter")} == {4}
    assert [size for kind, size, result in found if kind == "all-reduce" and f"f32[{vocab},{width // 4}]" in result] == [2]


def test_micro_batches_add_up_to_the_batch():
    one, parts = step_on("1x1"), step_on("2x1", accumulate=4)
    assert parts.loss == pytest.approx(one.loss, rel=TOLERANCE)
    assert_close(parts.gradients, one.gradients, TOLERANCE)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_stays_near_float32(param_dtype):
    exact, short = step_on("1x1"), step_on("1x1", PolicyConfig(dtype="bfloat16", param_dtype=param_dtype))
    assert {x.dtype.name for x in short.params.values()} == {param_dtype}
    assert short.loss == pytest.approx(exact.loss, rel=BF16_TOLERANCE)
    ours, theirs = (np.concatenate([g.ravel() for g in r.gradients.values()]) for r in (short, exact))
    assert np.dot(ours, theirs) / (np.linalg.norm(ours) * np.linalg.norm(theirs)) > 1 - BF16_TOLERANCE


def test_heads_that_the_model_axis_does_not_divide_are_refused():
    with pytest.raises(UserError, match=r"8 text attention heads, which 3 devices .* M divides 8"):
        check_mesh(d.ARCHITECTURE, make_mesh("1x3"))
    odd = replace(d.ARCHITECTURE, vision=replace(d.ARCHITECTURE.vision, heads=4))
    with pytest.raises(UserError, match="4 vision attention heads"):
        check_mesh(odd, make_mesh("1x8"))
    check_mesh(d.ARCHITECTURE, make_mesh("1x8"))


@pytest.mark.parametrize("text", ["8", "0x1", "2x", "axb", "2x2x2x2"])
def test_a_mesh_that_is_not_two_or_three_numbers_is_refused(text):
    with pytest.raises(UserError, match="write DATAxMODEL"):
        make_mesh(text)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UserError, match="mesh 4x4 needs 16 devices and this machine has 8"):
        make_mesh("4x4")


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(UserError, match="a batch of 6 rows does not split over 4 devices"):
        put_batch(np.zeros((6, 2)), make_mesh("4x2"))


def test_activations_are_pinned_under_a_mesh_and_left_alone_without():
    x = np.zeros((8, 4, 16), np.float32)
    pin = lambda x: constrain(x, "batch", None, "heads")  # noqa: E731
    assert jax.jit(pin)(x).sharding.is_fully_replicated
    mesh = make_mesh("4x2")
    with jax.set_mesh(mesh):
        expected = jax.NamedSharding(mesh, PartitionSpec(("replica", "data"), None, "model"))
        assert jax.jit(pin)(x).sharding.is_equivalent_to(expected, 3)
    assert put_batch(x, mesh).sharding == batch_sharding(mesh)
