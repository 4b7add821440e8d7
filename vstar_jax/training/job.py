"""The main job of `scripts/train.py`: prepare the data, measure the base model, fine-tune, measure again, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from vstar_jax import config as config_module
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.data.leakage import guard
from vstar_jax.data.pipeline import train_batches
from vstar_jax.data.task import Task
from vstar_jax.evaluation.protocol import evaluate
from vstar_jax.evaluation.report import Prediction, print_table, summarise, title, write_json, write_predictions
from vstar_jax.models import hf, lora
from vstar_jax.models.qwen2_5_vl import Qwen25VL, check_mesh
from vstar_jax.tools.host import annotations
from vstar_jax.training.grpo import train_grpo
from vstar_jax.training.metrics import MetricsWriter, draw_curves
from vstar_jax.training.sft import train


def load_policy(config: Config, mesh: Mesh) -> Qwen25VL:
    """The policy of a run before training, on `mesh`, with fresh adapters when the config asks for them."""
    path = config_module.resolve(config.policy.path)
    check_mesh(hf.Architecture.from_hf(path), mesh)
    model = hf.load(path, config.policy, mesh)
    if config.policy.lora.rank:
        lora.add(model, config.policy.lora, config.seed)
    return model


def run(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Trains and evaluates as `config` says; everything lands in `config.run_dir`, and the summaries are returned.

    A run directory that exists is resumed; the base model is measured once.
    """
    run_dir = Path(config.run_dir)
    chat = Chat(config_module.resolve(config.policy.path), config.video)
    task = make_task(config, chat)
    leakage = guard(task, config)
    config_module.start_run(config)
    model = load_policy(config, mesh)
    rows = {"base model": _measured(run_dir, "base", *nnx.split(model), task, chat, config, mesh)}
    if config.sft.steps:
        batches = train_batches(task.train_records(), task.example, config)
        trained = train(model, batches, config, mesh, run_dir)
        state = nnx.merge_state(trained.state.params, trained.state.frozen)
        rows["after SFT"] = _measured(run_dir, "sft", trained.graphdef, state, task, chat, config, mesh)
        with MetricsWriter(run_dir, resume_step=config.sft.steps) as metrics:
            final = rows["after SFT"]
            metrics.write(config.sft.steps, {f"eval/{k}": v for k, v in final.items() if k.endswith("top1")})
        model = nnx.merge(trained.graphdef, state)
        draw_curves(run_dir)
    if config.grpo.steps:
        learned = train_grpo(model, task, chat, annotations, config, mesh, run_dir)
        state = nnx.merge_state(learned.state.params, learned.state.frozen)
        rows["after GRPO"] = _measured(run_dir, "grpo", learned.graphdef, state, task, chat, config, mesh)
        draw_curves(run_dir)
    print_table(rows, title(config))
    result = {"mesh": config.mesh, "seed": config.seed, "steps": config.sft.steps, "leakage": leakage, **rows}
    write_json(run_dir / "result.json", result)
    return result


def _measured(
    run_dir: Path, name: str, graphdef: Any, state: Any, task: Task, chat: Chat, config: Config, mesh: Mesh
) -> dict[str, float]:
    predictions: Sequence[Prediction] = evaluate(graphdef, state, task, chat, config, mesh, name)
    folder = run_dir / "rollouts"
    folder.mkdir(exist_ok=True)
    write_predictions(folder / f"{name}.jsonl", predictions)
    return summarise(predictions)
