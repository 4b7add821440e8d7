"""Hugging Face model directories in and out, one tensor at a time.

`TABLE` maps our parameter paths to the names in released checkpoints. Loading reads a tensor, puts it on the mesh in its
sharding and forgets it, so host memory stays near the largest single tensor; stacked layers are filled in place.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vstar_jax.config import PolicyConfig
from vstar_jax.errors import UserError
from vstar_jax.models.config import Architecture
from vstar_jax.models.layers import LoraParam
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract
from vstar_jax.sharding import put, state_shardings

TABLE: Mapping[str, str] = {
    "visual.patch_embed": "visual.patch_embed.proj",
    "visual.blocks.norm1": "visual.blocks.{}.norm1",
    "visual.blocks.norm2": "visual.blocks.{}.norm2",
    "visual.blocks.qkv": "visual.blocks.{}.attn.qkv",
    "visual.blocks.proj": "visual.blocks.{}.attn.proj",
    "visual.blocks.mlp.gate_proj": "visual.blocks.{}.mlp.gate_proj",
    "visual.blocks.mlp.up_proj": "visual.blocks.{}.mlp.up_proj",
    "visual.blocks.mlp.down_proj": "visual.blocks.{}.mlp.down_proj",
    "visual.merger_norm": "visual.merger.ln_q",
    "visual.merger_in": "visual.merger.mlp.0",
    "visual.merger_out": "visual.merger.mlp.2",
    "text.layers.input_norm": "model.layers.{}.input_layernorm",
    "text.layers.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "text.layers.q_proj": "model.layers.{}.self_attn.q_proj",
    "text.layers.k_proj": "model.layers.{}.self_attn.k_proj",
    "text.layers.v_proj": "model.layers.{}.self_attn.v_proj",
    "text.layers.o_proj": "model.layers.{}.self_attn.o_proj",
    "text.layers.mlp.gate_proj": "model.layers.{}.mlp.gate_proj",
    "text.layers.mlp.up_proj": "model.layers.{}.mlp.up_proj",
    "text.layers.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "text.norm": "model.norm",
    "text.lm_head": "lm_head",
    "text": "model.embed_tokens",
}
"""Module path -> checkpoint name; {} is the layer. Our kernel, weight and embedding are `weight` there, bias is `bias`."""

ALIASES = (("model.visual.", "visual."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."))
"""Prefixes under which newer transformers save the same tensors -> the released ones."""

SHARD_BYTES = 2 << 30
"""Size at which `save` begins a new file."""


def checkpoint_name(path: tuple[str, ...]) -> str:
    """The name of a parameter in a checkpoint, with {} where a stacked parameter's layer goes."""
    *module, leaf = path
    return f"{TABLE['.'.join(module)]}.{'bias' if leaf == 'bias' else 'weight'}"


def to_ours(tensor: np.ndarray, shape: tuple[int, ...], leaf: str) -> np.ndarray:
    """A checkpoint's tensor as our parameter of one layer: kernels are [*in, *out] here and [out, in...] there."""
    if leaf != "kernel":
        return tensor.reshape(shape)
    return tensor.reshape(tensor.shape[0], -1).T.reshape(shape)


def to_theirs(array: np.ndarray, shape: tuple[int, ...], leaf: str) -> np.ndarray:
    """The inverse of `to_ours`; `shape` is the tensor's in the checkpoint."""
    if leaf != "kernel":
        return array.reshape(shape)
    return np.ascontiguousarray(array.reshape(-1, shape[0]).T).reshape(shape)


class Checkpoint:
    """The tensors of a model directory by their released names, whatever the files and the prefixes."""

    def __init__(self, path: str | Path):
        path = Path(path)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} holds no .safetensors file: give a model directory in Hugging Face format.")
        self.path = path
        self.where: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, "np") as opened:
                    for stored in opened.keys():  # noqa: SIM118 (not a mapping)
                        self.where[_released_name(stored)] = (file, stored)
            except SafetensorError as error:
                raise UserError(f"{file} cannot be read ({error}): copy the file again.") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type it has in the file."""
        if name not in self.where:
            raise UserError(
                f"{self.path} lacks the tensor {name}: the download is incomplete or config.json is another model's."
            )
        file, stored = self.where[name]
        with safe_open(file, "np") as opened:
            return opened.get_tensor(stored)


def _released_name(stored: str) -> str:
    for prefix, released in ALIASES:
        if stored.startswith(prefix):
            return released + stored.removeprefix(prefix)
    return stored


def load(path: str | Path, config: PolicyConfig, mesh: Mesh) -> Qwen25VL:
    """Loads a model directory onto `mesh`, each parameter in its sharding, in `config.param_dtype`.

    Raises UserError when a file or a tensor is missing or has another shape than config.json says.
    """
    architecture = Architecture.from_hf(path)
    checkpoint = Checkpoint(path)
    graphdef, state = nnx.split(abstract(architecture, config))
    shardings = dict(nnx.to_flat_state(state_shardings(state, mesh)))
    loaded = []
    for key, variable in nnx.to_flat_state(state):
        sharding = shardings[key].get_value()
        value = _load_parameter(checkpoint, tuple(map(str, key)), variable.get_value(), sharding)
        loaded.append((key, variable.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _load_parameter(
    checkpoint: Checkpoint, key: tuple[str, ...], target: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    name = checkpoint_name(key)
    if "{}" not in name:
        return _put(checkpoint, name, key, target.shape, sharding).astype(target.dtype)
    layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(target.shape, target.dtype, device=sharding)
    for index in range(target.shape[0]):
        array = _put(checkpoint, name.format(index), key, target.shape[1:], layer)
        stack = jax.block_until_ready(_fill(stack, array, index, sharding))
    return stack


@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _fill(stack: jax.Array, layer: jax.Array, index: jax.Array, sharding: NamedSharding) -> jax.Array:
    filled = jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)
    return jax.lax.with_sharding_constraint(filled, sharding)


def _put(checkpoint: Checkpoint, name: str, key: tuple[str, ...], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """One tensor on the mesh in our layout; its host copy is gone when this returns."""
    tensor, expected = checkpoint.read(name), their_shape(key, shape)
    if tensor.shape != expected:
        raise UserError(
            f"the tensor {name} of {checkpoint.path} has the shape {tensor.shape} where config.json asks for {expected}: "
            "use the config.json that belongs to these weights."
        )
    return jax.block_until_ready(put(to_ours(tensor, shape, key[-1]), sharding))


def tensors(model: Qwen25VL) -> Iterator[tuple[str, np.ndarray]]:
    """The model as (released name, host array) in the checkpoint's layout, one layer of one parameter at a time.

    Raises ValueError when the model has unmerged adapters.
    """
    for names, variable in nnx.to_flat_state(nnx.state(model)):
        key = tuple(map(str, names))
        if isinstance(variable, LoraParam):
            raise ValueError("merge the LoRA adapters (models.lora.merge) before exporting the model")
        name, leaf, value = checkpoint_name(key), key[-1], variable.get_value()
        stacked = "{}" in name
        for index in range(value.shape[0] if stacked else 1):
            array = np.asarray(jax.lax.dynamic_index_in_dim(value, index, keepdims=False) if stacked else value)
            yield name.format(index), to_theirs(array, their_shape(key, array.shape), leaf)


def their_shape(key: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of a parameter (of one layer of it) that has `shape` here."""
    module, leaf = key[-2], key[-1]
    if module == "patch_embed":
        return (shape[-1], 3, 2, 14, 14)
    if leaf == "embedding":
        return shape
    if leaf != "kernel":
        return (math.prod(shape),)
    inputs = 2 if module in ("proj", "o_proj") else 1
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def save(model: Qwen25VL, path: str | Path, like: str | Path | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a directory that Hugging Face transformers loads; nothing half-written stays under `path`.

    like: a model directory of the same architecture, whose config.json, tokenizer, chat template and processor files are
    copied along. Raises UserError when `path` exists or cannot be written, and when `like` is another model.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: give a directory that does not.")
    if like is not None and Architecture.from_hf(like) != model.architecture:
        raise UserError(
            f"the config.json of {like} describes another model than the one to save: give the directory it came from."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            target = Path(temporary) / path.name
            target.mkdir()
            if like is not None:
                _copy_companions(Path(like), target)
            _write_config(model, target / "config.json")
            _write_shards(model, target, shard_bytes)
            target.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be written to {path} ({error}): free space there or give another directory."
        ) from error


def _copy_companions(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in (".safetensors", ".md") and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, target / file.name)


def _write_config(model: Qwen25VL, file: Path) -> None:
    """config.json with the type of the parameters, which transformers would otherwise cast to the type written there."""
    raw = json.loads(file.read_text()) if file.exists() else model.architecture.to_hf()
    raw.pop("dtype", None)
    raw["torch_dtype"] = model.text.embedding.get_value().dtype.name
    file.write_text(json.dumps(raw, indent=2) + "\n")


def _write_shards(model: Qwen25VL, target: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        shards.append(list(pending))
        save_file(pending, target / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        pending.clear()

    for name, array in tensors(model):
        if pending and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        (target / "part-1.safetensors").rename(target / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (target / f"part-{number}.safetensors").rename(target / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
