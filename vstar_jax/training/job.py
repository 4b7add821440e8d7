"""The main job of `scripts/train.py`: measure the base model, fine-tune, learn by reward, measure after each, report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import config as config_module
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.data.leakage import guard
from vstar_jax.data.pipeline import train_batches
from vstar_jax.data.task import Task
from vstar_jax.distributed import first, first_alone, largest, told
from vstar_jax.errors import UserError
from vstar_jax.evaluation.checkpoint import restore
from vstar_jax.evaluation.protocol import evaluate
from vstar_jax.evaluation.report import print_table, read_predictions, summarise, title, write_predictions
from vstar_jax.models import hf, lora
from vstar_jax.models.qwen2_5_vl import Qwen25VL, check_mesh
from vstar_jax.pages import write_json
from vstar_jax.tools.host import Tools
from vstar_jax.tools.launch import open_tools
from vstar_jax.training import grpo
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

    A run directory that exists is resumed, in the phase in which it was left.
    """
    run_dir = Path(config.run_dir)
    chat = Chat(config_module.resolve(config.policy.path), config.video)
    with first_alone():  # a benchmark that is not there yet is rendered once
        task = make_task(config, chat)
    leakage = guard(task, config)
    with first_alone():
        if first():
            config_module.start_run(config)
    with open_tools(config, run_dir / "tools") as tools:
        job = _Job(config, mesh, run_dir, chat, task, tools)
        graphdef, state = nnx.split(load_policy(config, mesh))
        rows = {"base model": job.measured("base", graphdef, state)}
        if config.sft.steps:
            graphdef, state = job.fine_tuned()
            rows["after SFT"] = job.measured("sft", graphdef, state)
            job.note(config.sft.steps, rows["after SFT"])
        if config.grpo.steps:
            graphdef, state = job.reinforced(nnx.merge(graphdef, state))
            rows["after GRPO"] = job.measured("grpo", graphdef, state)
            job.note(config.sft.steps + config.grpo.steps, rows["after GRPO"])
    result: dict[str, Any] = {"mesh": config.mesh, "seed": config.seed, "steps": config.sft.steps, "leakage": leakage, **rows}
    if config.data.assess:
        result["assessment"] = task.audit()
    if first():
        if config.sft.steps or config.grpo.steps:
            draw_curves(run_dir)
        print_table(rows, title(config))
        write_json(run_dir / "result.json", result)
    return result


class _Job:
    """The phases of a run; each returns the graph definition and the state of the policy after it."""

    def __init__(self, config: Config, mesh: Mesh, run_dir: Path, chat: Chat, task: Task, tools: Tools):
        self.config, self.mesh, self.run_dir, self.chat, self.task, self.tools = config, mesh, run_dir, chat, task, tools

    def fine_tuned(self) -> tuple[Any, Any]:
        """SFT; once GRPO has a checkpoint its result is only read, for training would cut the metrics off behind it."""
        if _has_checkpoint(self.run_dir / grpo.FOLDER):
            return restore(str(self.run_dir), self.config, self.mesh)
        batches = train_batches(
            self.task.train_records(),
            self.task.example,
            self.config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            agree=largest,
        )
        trained = train(load_policy(self.config, self.mesh), batches, self.config, self.mesh, self.run_dir)
        return trained.graphdef, nnx.merge_state(trained.state.params, trained.state.frozen)

    def reinforced(self, model: Qwen25VL) -> tuple[Any, Any]:
        """GRPO; the folder of its checkpoints is a run of its own for scripts/evaluate.py.

        UserError when the reference would be the model from before SFT, whose adapters the policy still has.
        """
        if self.config.grpo.reference == "adapters_off" and self.config.sft.steps:
            raise UserError(
                "grpo.reference is adapters_off, which after SFT of the same adapters is the model before SFT: set "
                "grpo.reference=frozen, or sft.steps=0."
            )
        folder = self.run_dir / grpo.FOLDER
        with first_alone():
            if first():
                config_module.save(replace(self.config, run_dir=str(folder)), folder / "config.yaml")
        learned = grpo.train_grpo(model, self.task, self.chat, self.tools, self.config, self.mesh, self.run_dir)
        return learned.graphdef, nnx.merge_state(learned.state.params, learned.state.frozen)

    def note(self, step: int, summary: Mapping[str, float]) -> None:
        """Writes a phase's accuracies beside its last step's metrics, unless later ones are there already."""
        if step < self.config.sft.steps + self.config.grpo.steps and _has_checkpoint(self.run_dir / grpo.FOLDER):
            return
        with MetricsWriter(self.run_dir, resume_step=step) as metrics:
            metrics.write(step, {f"eval/{k}": v for k, v in summary.items() if k.endswith("top1")})

    def measured(self, name: str, graphdef: Any, state: Any) -> dict[str, float]:
        """Held-out accuracy with the tools on; a run that resumes does not measure again what it has measured."""
        path = self.run_dir / "rollouts" / f"{name}.jsonl"
        if not told(path.exists()):
            predictions = evaluate(graphdef, state, self.task, self.chat, self.tools, self.config, self.mesh, name)
            if first():
                path.parent.mkdir(exist_ok=True)
                write_predictions(path, predictions)
        return told(summarise(read_predictions(path)) if first() else {})


def _has_checkpoint(run_dir: Path) -> bool:
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))
