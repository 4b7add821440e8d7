"""Model directories in and out: bitwise round trips, what a user can get wrong, and the host memory that loading takes."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import dialogues as d
import ml_dtypes  # noqa: F401 (gives numpy the bfloat16 that safetensors files hold)
import numpy as np
import pytest
import reference
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vstar_jax.config import PolicyConfig
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import abstract, create
from vstar_jax.sharding import make_mesh

SHARD = 100_000
"""Bytes a file of the tiny model may have, so that it comes in several."""


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by the names in its files."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def load(path: Path, dtype: str = "float32", mesh: str = "1x1"):
    return hf.load(path, PolicyConfig(dtype=dtype, param_dtype=dtype), make_mesh(mesh))


@pytest.fixture(scope="module", params=[("float32", True), ("bfloat16", False)], ids=["float32, tied", "bfloat16, untied"])
def saved_by_torch(request, tmp_path_factory):
    """A directory of several files that torch wrote, and its type."""
    dtype, tie = request.param
    path = tmp_path_factory.mktemp("torch") / "model"
    reference.torch_model(tie=tie).to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=SHARD)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, dtype


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "model"
    hf.save(create(d.ARCHITECTURE, PolicyConfig(), 0), path)
    return path


@pytest.fixture
def directory(saved, tmp_path):
    """A small good directory of ours, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_round_trip_keeps_every_bit(saved_by_torch, tmp_path):
    path, dtype = saved_by_torch
    hf.save(load(path, dtype), tmp_path / "ours", shard_bytes=SHARD)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    ours = tensors(tmp_path / "ours")
    assert_same_bits(ours, tensors(path))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "ours" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a mapping)


def test_a_round_trip_over_a_mesh_keeps_every_bit(saved_by_torch, tmp_path):
    path, dtype = saved_by_torch
    hf.save(load(path, dtype, "4x2"), tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    assert_same_bits(tensors(tmp_path / "ours"), tensors(path))


@pytest.mark.parametrize("like", [False, True], ids=["own config", "copied config"])
def test_transformers_loads_what_we_save(saved_by_torch, tmp_path, like):
    path, dtype = saved_by_torch
    hf.save(load(path, dtype), tmp_path / "ours", like=path if like else None, shard_bytes=SHARD)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert ours.dtype == theirs.dtype == getattr(torch, dtype)
        assert torch.equal(ours, theirs), name
    tokens = torch.arange(d.FIRST_TEXT, d.FIRST_TEXT + 20)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert (tmp_path / "ours" / "generation_config.json").exists() == like


def test_float32_parameters_are_saved_as_such_beside_a_copied_bfloat16_config(saved_by_torch, tmp_path):
    path, _ = saved_by_torch
    hf.save(load(path, "float32"), tmp_path / "ours", like=path)
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == torch.float32


def test_names_of_newer_releases_are_read_as_the_released_ones(directory, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shutil.copy(directory / "config.json", renamed)
    newer = {}
    for name, tensor in tensors(directory).items():
        name = re.sub(r"^model\.", "model.language_model.", name)
        newer[re.sub(r"^visual\.", "model.visual.", name)] = tensor
    save_file(newer, renamed / "model.safetensors")
    hf.save(load(renamed), tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "ours"), tensors(directory))


@pytest.mark.parametrize("name", ["tiny", "3b", "7b"])
def test_every_preset_survives_its_own_config_json(name, tmp_path):
    architecture = Architecture.preset(name)
    (tmp_path / "config.json").write_text(json.dumps(architecture.to_hf()))
    assert Architecture.from_hf(tmp_path) == architecture


def test_the_config_of_transformers_gives_the_architecture_that_was_asked_for(saved_by_torch):
    path, _ = saved_by_torch
    config = reference.torch_model(tie=True).config
    architecture = Architecture.from_hf(path)
    assert architecture.text.mrope_section == (2, 3, 3)
    assert architecture.text.rope_theta == 1e4
    assert architecture.text.kv_heads == config.text_config.num_key_value_heads
    assert architecture.vision.full_attention_layers == (1, 3)
    assert architecture.tokens_per_second == d.TOKENS_PER_SECOND
    assert (architecture.image_pad, architecture.video_pad) == (d.IMAGE_PAD, d.VIDEO_PAD)


def test_a_missing_tensor_is_named(directory):
    file = directory / "model.safetensors"
    kept = load_file(file)
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, file)
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x.T], ids=["another size", "transposed"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(directory, spoil):
    file = directory / "model.safetensors"
    kept = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = kept[name].shape
    kept[name] = np.ascontiguousarray(spoil(kept[name]))
    save_file(kept, file)
    with pytest.raises(UserError, match=re.escape(f"{kept[name].shape} where config.json asks for {shape}")):
        load(directory)


def test_a_directory_without_config_or_weights_is_refused(directory, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(directory)


def test_a_truncated_file_is_named(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .* copy the file again"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "only qwen2_5_vl can be loaded"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"vision_config.window_size": 56}, "only 112 is supported"),
    ],
)
def test_a_config_that_is_another_model_is_refused(directory, change, message):
    raw = json.loads((directory / "config.json").read_text())
    for key, value in change.items():
        *outer, last = key.split(".")
        place = raw[outer[0]] if outer else raw
        if value is None:
            del place[last]
        else:
            place[last] = value
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load(directory)


def test_a_config_that_is_no_json_is_refused(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(directory)


def test_saving_over_a_directory_is_refused(directory):
    before = tensors(directory)
    with pytest.raises(UserError, match="exists already"):
        hf.save(load(directory), directory)
    assert_same_bits(tensors(directory), before)


def test_saving_beside_the_files_of_another_model_is_refused(directory, tmp_path):
    model = load(directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 9}))
    with pytest.raises(UserError, match="another model"):
        hf.save(model, tmp_path / "other", like=directory)


def test_a_save_that_fails_says_so_and_leaves_nothing(directory, tmp_path):
    """A limit on file size stands in for a full disk: the system call that writes fails in the same place."""
    model = load(directory)
    (tmp_path / "out").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*: free space there or give another directory\."):
            hf.save(model, tmp_path / "out" / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


GIB = 1 << 30
LOAD = """
import sys
import jax
from flax import nnx
from vstar_jax.config import PolicyConfig
from vstar_jax.models import hf
from vstar_jax.sharding import make_mesh
model = hf.load(sys.argv[1], PolicyConfig(dtype="bfloat16", param_dtype="bfloat16"), make_mesh("1x1"))
print(sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))))
"""


def sparse_checkpoint(path: Path) -> tuple[int, int]:
    """Zeros in bfloat16 as files with holes, written in no time; returns the bytes of all and of the largest tensor."""
    tiny = Architecture.preset("tiny")
    wide = dict(vocab=16384, hidden=2048, intermediate=16384, layers=9, heads=16, kv_heads=2, head_dim=128)
    text = replace(tiny.text, **wide, tie_embeddings=False, mrope_section=(16, 24, 24))
    architecture = replace(tiny, text=text, vision=replace(tiny.vision, out_hidden=2048))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(architecture.to_hf()))
    shapes = {}
    for key, variable in nnx.to_flat_state(nnx.state(abstract(architecture, PolicyConfig()))):
        name, shape = hf.checkpoint_name(key), variable.get_value().shape
        layers = shape[0] if "{}" in name else 1
        for layer in range(layers):
            shapes[name.format(layer)] = hf.their_shape(key, shape[1:] if "{}" in name else shape)
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(4)]
    for i, (name, shape) in enumerate(shapes.items()):
        files[i * len(files) // len(shapes)][name] = shape
    for number, names in enumerate(files):
        header, at = {}, 0
        for name, shape in names.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text_header = json.dumps(header).encode()
        with open(path / f"model-{number}.safetensors", "wb") as file:
            file.write(len(text_header).to_bytes(8, "little") + text_header)
            file.truncate(8 + len(text_header) + at)
    sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def peak_anonymous(process: subprocess.Popen) -> int:
    """Largest anonymous resident memory in bytes of a process, seen from outside until it ends."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if match := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(match[1]) * 1024)
        time.sleep(0.002)
    return peak


def test_loading_takes_the_model_and_little_more(tmp_path):
    total, largest = sparse_checkpoint(tmp_path / "model")
    assert total > 1.8 * GIB
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True)
    peak = peak_anonymous(process)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert int(out) == total
    assert peak > total  # the measurement sees the model itself
    assert peak - total < largest + GIB
