"""Evaluation of something that exists: a run's last checkpoint or a model directory, restored on any mesh."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import config as config_module
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.errors import UserError
from vstar_jax.evaluation.protocol import evaluate
from vstar_jax.evaluation.report import print_table, summarise, write_json, write_predictions
from vstar_jax.models import hf, lora
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import abstract, check_mesh
from vstar_jax.sharding import state_shardings
from vstar_jax.training.checkpoint import Checkpointer


def config_of(checkpoint: str, mesh: str | None, settings: Sequence[str]) -> Config:
    """The config to evaluate with: the run's own, or the defaults for a model directory, with flags on top.

    Raises UserError when `checkpoint` is neither a run directory nor a model directory.
    """
    path = Path(checkpoint)
    if (path / "config.yaml").is_file():
        config = config_module.parse([f"--config={path / 'config.yaml'}", *settings])
    elif (path / "config.json").is_file():
        config = config_module.parse([*settings, f"--policy.path={path}"])
    else:
        raise UserError(
            f"{checkpoint} is neither a run (it has no config.yaml) nor a model directory (no config.json): "
            "give the --run-dir of a training run or a directory in Hugging Face format."
        )
    return dataclasses.replace(config, mesh=mesh or config.mesh)


def restore(checkpoint: str, config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """Graph definition and parameters of a run's last checkpoint, or of a model directory, on `mesh`."""
    path = config_module.resolve(config.policy.path)
    architecture = Architecture.from_hf(path)
    check_mesh(architecture, mesh)
    if not (Path(checkpoint) / "config.yaml").is_file():
        return nnx.split(hf.load(path, config.policy, mesh))
    checkpointer = Checkpointer(Path(checkpoint) / "checkpoints")
    with jax.set_mesh(mesh):
        if config.policy.lora.rank:
            model = hf.load(path, config.policy, mesh)
            lora.add(model, config.policy.lora, config.seed)
        else:
            model = abstract(architecture, config.policy)
        graphdef, params, *rest = nnx.split(model, lora.trainable(config.policy.lora), ...)
        targets = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, state_shardings(params, mesh)
        )
        params = checkpointer.restore_params(targets)
    checkpointer.close()
    return graphdef, nnx.merge_state(params, *rest)


def measure(checkpoint: str, config: Config, mesh: Mesh, out: str | None) -> dict[str, Any]:
    """Evaluates, prints the table, and writes result.json and the predictions of every clip; returns the result."""
    folder = Path(out) if out else Path(checkpoint) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    chat = Chat(config_module.resolve(config.policy.path), config.video)
    task = make_task(config, chat)
    graphdef, state = restore(checkpoint, config, mesh)
    predictions = evaluate(graphdef, state, task, chat, config, mesh, Path(checkpoint).name)
    summary = summarise(predictions)
    print_table({Path(checkpoint).name: summary}, f"{config.data.dataset}, held-out clips, {config.data.labels} labels a clip")
    result = {"checkpoint": str(checkpoint), "mesh": config.mesh, "seed": config.seed, **summary}
    write_predictions(folder / "predictions.jsonl", predictions)
    write_json(folder / "result.json", result)
    return result
