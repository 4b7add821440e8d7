"""What is read from compiled programs is what they do, and the programs of a run compile for TPUs and GPUs that are not there.

The first part compiles for simulated CPU devices; what needs libtpu or JAX's plugin for CUDA is skipped where they are not
installed.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vstar_jax.config import Config, parse
from vstar_jax.errors import UserError
from vstar_jax.models import attention
from vstar_jax.scaling import chips, compiler, programs, report, tables
from vstar_jax.scaling.collectives import axis_of, collective_bytes, groups
from vstar_jax.scaling.hlo import Module, flops, moved

TOLERANCE = 1e-6  # float32: blocks of queries add nothing up in another order but for fused products
SMALL = (
    *("--data.tokens=[64,192]", "--data.patches=[128,256]", "--sft.batch_size=4", "--sft.chunk=64"),
    *("--grpo.prompts=4", "--grpo.group=2", "--grpo.accumulate=2", "--grpo.chunk=64"),
    *("--rollout.max_new_tokens=[8,16]", "--rollout.turn_tokens=64"),
)
needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra gpu")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")


def small(*flags: str) -> Config:
    return parse([*SMALL, *flags], programs.paper("tiny"))


def text_of(mesh: Mesh, function: Callable[[jax.Array], jax.Array], spec: P, *shape: int) -> str:
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(x).compile().as_text()


def test_collective_bytes_are_those_of_a_program_with_known_collectives(mesh: Callable[[str], Mesh]):
    def local(x: jax.Array) -> jax.Array:  # [2, 64]: 512 bytes on each of 4 x 2 devices
        gathered = jax.lax.all_gather(x, "data", axis=0, tiled=True)
        return x + jax.lax.psum(x, "model") + gathered.mean()

    text = text_of(mesh("4x2"), local, P("data", "model"), 8, 128)
    sent = collective_bytes(Module(text), {"data": 4, "model": 2})
    assert sent["model"] == {"all-reduce": 2 * 512 / 2}
    assert sent["data"] == {"all-gather": 3 * 512}


def test_what_a_scanned_loop_sends_and_computes_counts_once_an_iteration(mesh: Callable[[str], Mesh]):
    def local(x: jax.Array) -> jax.Array:  # [16, 16]: 1024 bytes
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.psum(x @ x, "data")), None

        return jax.lax.scan(body, x, None, length=7)[0]

    module = Module(text_of(mesh("8x1"), local, P("data"), 128, 16))
    assert collective_bytes(module, {"data": 8, "model": 1}) == {"data": {"all-reduce": 7 * 2 * 1024 * 7 / 8}}
    assert module.total(flops) == 7 * 2 * 16**3


NESTED = """HloModule nested

%inner (stack: f32[4,128], at: s32[]) -> f32[128] {
  %stack = f32[4,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = f32[1,128]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,128}
  ROOT %flat = f32[128]{0} bitcast(%layer)
}

%outer (whole: f32[4,128], number: s32[]) -> f32[128] {
  %whole = f32[4,128]{1,0} parameter(0)
  %number = s32[] parameter(1)
  %taken = f32[128]{0} fusion(%whole, %number), kind=kLoop, calls=%inner
  ROOT %twice = f32[128]{0} add(%taken, %taken)
}

ENTRY %main (a: f32[4,128], i: s32[]) -> f32[128] {
  %a = f32[4,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[128]{0} fusion(%a, %i), kind=kLoop, calls=%outer
}
"""


def test_of_a_stack_of_layers_a_fusion_in_a_fusion_reads_the_one_that_it_takes():
    module = Module(NESTED)
    assert module.total(moved(module)) == 128 * 4 + 4 + 128 * 4


CUDNN = """HloModule attention

ENTRY %main (q: bf16[2,64,4,80], k: bf16[2,64,2,80]) -> bf16[2,4,64,80] {
  %q = bf16[2,64,4,80]{3,2,1,0} parameter(0)
  %k = bf16[2,64,2,80]{3,2,1,0} parameter(1)
  %dot_product_attention_KIND.1 = (bf16[2,4,64,80]{3,1,2,0}, f32[2,4,64]{2,1,0}) custom-call(%q, %k, %k), CONFIG
  ROOT %out = bf16[2,4,64,80]{3,1,2,0} get-tuple-element(%dot_product_attention_KIND.1), index=0
}
"""
CONFIG = (
    'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": '
    '{"element_type": "BF16", "dimensions": ["2", "4", "64", "96"]}, "is_flash_attention": true, "mask_type": "MASK"}}'
)


@pytest.mark.parametrize(("kind", "products"), [("fwd", 2), ("bwd", 5)])
@pytest.mark.parametrize(("mask", "share"), [("CAUSAL", 0.5), ("PADDING_CAUSAL", 0.5), ("PADDING", 1), ("NO_MASK", 1)])
def test_what_a_kernel_of_cudnn_computes_follows_from_its_scores_and_their_mask(kind, products, mask, share):
    module = Module(CUDNN.replace("CONFIG", CONFIG).replace("KIND", kind).replace("MASK", mask))
    assert module.total(flops) == share * products * 2 * (2 * 4 * 64 * 96) * 80


@pytest.mark.parametrize(
    ("attributes", "axis"),
    [
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data"),
        ("replica_groups=[4,2]<=[8]", "model"),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "model"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", "dataxmodel"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "model"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_0'}", "data"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", "data"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", "none"),
        ("replica_groups={}", "dataxmodel"),
    ],
)
def test_every_way_to_write_replica_groups_tells_its_axis(attributes: str, axis: str):
    assert axis_of(groups(attributes, 8), {"data": 4, "model": 2}) == axis


def test_groups_in_a_notation_that_is_not_known_are_no_guess():
    with pytest.raises(ValueError, match="a way that is not known"):
        groups("channel_id=1, replica_groups=<new notation>, dimensions={0}", 8)


def test_a_page_adds_up_and_parameters_are_what_a_device_holds(mesh: Callable[[str], Mesh]):
    config, devices = small(), mesh("4x2")
    (program,) = programs.programs(config, programs.architecture_of("tiny"), devices, "sft")
    identity = identity_of(config, "4x2")
    found = compiler.compiled(program, identity, devices, chips.CHIPS["v5e"])
    assert sum(found.parts.values()) + found.cache + found.activations == found.peak
    assert found.activations > 0
    state = program.arguments[0]
    weights = jax.tree.leaves((state.params, state.frozen))
    assert found.parts["parameters"] == sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in weights)
    assert found.parts["parameters"] < sum(4 * x.size for x in weights) / 4
    assert found.parts["optimizer"] == 2 * found.parts["parameters"] + 8  # two moments, and two counters
    assert set(found.sent) >= {"data", "model"}
    assert report.Record.from_json(json.loads(json.dumps(found.as_json()))).peak == found.peak
    assert "activations and temporaries" in report.page(found)


def identity_of(config: Config, mesh: str) -> dict[str, Any]:
    told = {"model": "tiny", "topology": "v5e:2x4", "mesh": mesh, "flags": [], "versions": {}}
    return {**told, "settings": compiler.told(config)}


def test_adapters_leave_the_optimizer_and_the_reference_almost_nothing(mesh: Callable[[str], Mesh]):
    def parts(*flags: str) -> dict[str, int]:
        architecture = programs.architecture_of("qwen2.5-vl-3b")
        config = parse(list(flags), programs.paper("qwen2.5-vl-3b"))
        (program,) = programs.programs(config, architecture, mesh("8x1"), "rollout")
        return report.held(program)

    whole, adapted = parts(), parts("--policy.lora.rank=16", "--grpo.reference=adapters_off")
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=0.01)
    assert whole["reference"] == whole["parameters"]
    assert adapted["optimizer"] < 0.05 * whole["optimizer"]
    assert "reference" not in adapted


def test_a_program_that_cannot_fit_is_not_compiled_and_says_what_would_help(mesh: Callable[[str], Mesh]):
    config, devices = small(), mesh("1x1")
    (program,) = programs.programs(config, programs.architecture_of("tiny"), devices, "sft")
    chip = chips.Chip("v5e", 16, 1000)
    found = compiler.compiled(program, identity_of(config, "1x1"), devices, chip)
    assert not found.fits
    page = report.page(found)
    assert "DOES NOT FIT" in page
    assert "optimizer" in page
    assert "--policy.lora.rank" in page
    assert "--policy.param_dtype=bfloat16" in page


REFUSALS = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (564.29G) exceeds available "
    "HBM (15.75G).": (564.29, []),
    """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.13G of 15.75G hbm. Exceeded hbm capacity by 3.38G.

  Largest program allocations in hbm:

  1. Size: 1.74G
     Operator: op_name="jit(train_step)/jvp()/while/body/dot_general"
     Shape: bf16[36,2,6144,2048]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 1.74G
""": (19.13, [(int(1.74 * chips.GIB), "bf16[36,2,6144,2048] of while/body/dot_general")]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_the_compilers_refusal_becomes_a_page(mesh: Callable[[str], Mesh], message: str):
    config = small()
    (program,) = programs.programs(config, programs.architecture_of("tiny"), mesh("4x1"), "sft")
    seconds = {"lower": 0.0, "compile": 0.0, "processor": 0.0}
    found = report.refused(program, identity_of(config, "4x1"), message, seconds)
    used, largest = REFUSALS[message]
    assert found is not None
    assert found.limit == int(15.75 * chips.GIB)
    assert found.peak == pytest.approx(used * chips.GIB, rel=0.01)
    assert found.largest == largest
    assert "DOES NOT FIT" in report.page(found)
    assert report.refused(program, identity_of(config, "4x1"), "INTERNAL: something else", seconds) is None


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v5e", "write CHIP:SHAPE"),
        ("v9:2x2", "choose one of v5e, v5p, v6e, h100, h200"),
        ("v5e:2x2x1", "does not have the 2 numbers"),
        ("v5p:2x2", "write it as in v5p:2x2x1"),
        ("h200:2x4", "write it as in h200:8"),
        ("h200:9", "choose h200:1 to h200:8"),
    ],
)
def test_a_slice_that_is_none_is_one_sentence(topology: str, told: str):
    with pytest.raises(UserError, match=told):
        chips.chip_of(topology)


def test_a_mesh_must_cover_its_slice_and_suit_the_model(mesh: Callable[[str], Mesh]):
    config = parse(["--mesh=2x1"], programs.paper("tiny"))
    with pytest.raises(UserError, match="mesh 2x1 is of 2 devices and v5e:2x2 has 4"):
        compiler.compile_all(config, "tiny", "v5e:2x2", "sft", [])
    with pytest.raises(UserError, match="attention heads"):
        programs.programs(small(), programs.architecture_of("qwen2.5-vl-7b"), mesh("1x8"), "sft")
    with pytest.raises(UserError, match="a batch of 4 rows does not split over 8 devices"):
        programs.programs(small(), programs.architecture_of("tiny"), mesh("8x1"), "sft")


def test_without_libtpu_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        chips.devices("v5e:2x2")


def test_without_the_plugin_for_cuda_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install -e '.\[gpu\]'"):
        chips.devices("h200:8")


def test_a_rollout_cannot_be_compiled_for_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="only where there is one: choose one of sft, grpo"):
        compiler.compile_all(parse(["--mesh=8x1"], programs.paper("tiny")), "tiny", "h200:8", "rollout", [])


def test_unknown_models_and_programs_are_one_sentence():
    with pytest.raises(UserError, match=r"choose one of tiny, qwen2.5-vl-3b, qwen2.5-vl-7b"):
        programs.paper("llama")
    with pytest.raises(UserError, match="choose one of sft, rollout, grpo"):
        compiler.compile_all(parse(["--mesh=4x1"], programs.paper("tiny")), "tiny", "v5e:2x2", "training", [])


def test_long_turns_attend_in_blocks_as_they_would_at_once(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 11, 4, 8), (2, 2, 8, 20), (2, 2, 20, 8)))
    prefix = (k[:1, ..., :5], v[:1, :, :5], jnp.asarray([4]))
    slots = jnp.arange(11) + jnp.asarray([[0], [3]])
    whole = attention.attention_cached(q, k, v, slots), attention.attention_after(prefix, q, k, v, slots)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    blocks = attention.attention_cached(q, k, v, slots), attention.attention_after(prefix, q, k, v, slots)
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


@pytest.fixture
def refused(mesh: Callable[[str], Mesh]) -> report.Record:
    """The record of a program that does not fit."""
    config = small()
    (program,) = programs.programs(config, programs.architecture_of("tiny"), mesh("1x1"), "sft")
    return compiler.compiled(program, identity_of(config, "8x1"), mesh("1x1"), chips.Chip("v5e", 16, 1000))


def test_tables_are_made_of_the_cells_that_have_run(refused: report.Record):
    cell = tables.Cell("qwen2.5-vl-3b", "v5e:2x4", "8x1", "sft", ("--sft.accumulate=1",))
    table = tables.smallest({cell.name: [refused]})
    assert "| qwen2.5-vl-3b | SFT | v5e:2x4 (8x1): no" in table
    assert "| qwen2.5-vl-7b | GRPO | not run | not run | not run |" in table
    changed = tables.Cell(*tables.COMPARED, "sft", ("--policy.remat=none",))
    (row,) = [line for line in tables.settings({changed.name: [refused]}).splitlines() if line.startswith("| sft |")]
    assert row.startswith("| sft | `--policy.remat=none` |")
    assert row.endswith(f"| {refused.peak / chips.GIB:.1f}, does not fit |")


def test_every_setting_that_is_compared_makes_a_run():
    for changes in tables.SETTINGS.values():
        for change in changes:
            parse(list(change), programs.paper(tables.COMPARED[0]))


def test_a_ladder_ends_where_it_fits_and_tables_go_on_from_their_record(
    refused: report.Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fitting = replace(refused, refused="", limit=refused.peak)
    compiled: list[tables.Cell] = []

    def compile_cell(cell: tables.Cell, _: Path) -> list[report.Record]:
        compiled.append(cell)
        if len(compiled) == 9:
            raise UserError("the power is out")
        return [refused if cell.topology == "v5e:1x1" or (cell.what == "grpo" and cell.mesh == "4x1") else fitting]

    monkeypatch.setattr(tables, "_compiled", compile_cell)
    page = tmp_path / "scaling.md"
    page.write_text("before\n<!-- seconds -->\nold\n<!-- end of seconds -->\nafter\n")
    with pytest.raises(UserError, match="power"):
        tables.run(page, Path("compile.py"), [])
    assert page.read_text().startswith("before\n<!-- seconds -->\n| program |")
    tables.run(page, Path("compile.py"), [])
    names = [cell.name for cell in compiled]
    assert [name for name in names if names.count(name) > 1] == [names[8]] * 2  # the one that was interrupted
    ladder = [(c.mesh, c.what) for c in compiled if c.model == "qwen2.5-vl-3b" and c.topology.startswith("v5e")]
    steps = [("1x1", "sft"), ("4x1", "sft"), ("1x1", "rollout"), ("4x1", "rollout"), ("4x1", "grpo")]
    assert ladder == [*steps, ("8x1", "rollout"), ("8x1", "grpo")]
    told = page.read_text()
    compiled.clear()
    tables.run(page, Path("compile.py"), [])
    assert not compiled
    assert page.read_text() == told
    assert "not run" not in told


@needs_cuda
@pytest.mark.parametrize("what", ["sft", "grpo"])
def test_the_programs_of_a_run_compile_for_gpus_that_are_not_there(what: str):
    flags = ["--mesh=2x2", "--policy.dtype=bfloat16"]
    found = compiler.compile_all(small(*flags), "tiny", "h200:4", what, flags)
    assert [r.identity["program"] for r in found] == {"grpo": ["reference", "update"]}.get(what, [what])
    for r in found:
        assert r.fits
        assert r.flops > 0
        assert set(r.sent) >= {"data", "model"}


@needs_libtpu
@pytest.mark.parametrize("what", programs.WHATS)
def test_the_programs_of_a_run_compile_for_a_tpu_that_is_not_there(what: str):
    flags = ["--mesh=2x2", "--policy.dtype=bfloat16"]
    found = compiler.compile_all(small(*flags), "tiny", "v5e:2x2", what, flags)
    assert [r.identity["program"] for r in found] == {"grpo": ["reference", "update"]}.get(what, [what])
    for r in found:
        assert r.fits
        assert r.flops > 0
        assert set(r.sent) >= {"data", "model"}
    if what == "rollout":
        assert found[0].cache > 0
        # The copy of the weights is whole along data: not even one of the decoded tokens gathers them.
        assert sum(found[0].sent["data"].values()) < found[0].parts["weights"]
