"""Evaluation of something that exists: a run's last checkpoint or a model directory, restored on any mesh."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import config as config_module
from vstar_jax import settings as settings_module
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import STICK_MOTION, make_task
from vstar_jax.data.leakage import guard
from vstar_jax.dialogue import Prompts
from vstar_jax.distributed import first, first_alone, told
from vstar_jax.errors import UserError
from vstar_jax.evaluation.journal import Journal
from vstar_jax.evaluation.protocol import evaluate
from vstar_jax.evaluation.report import groups_of, print_table, summarise, title
from vstar_jax.evaluation.tables import TITLES, own_row, table_of
from vstar_jax.models import hf, lora
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import abstract, check_mesh
from vstar_jax.pages import write_json
from vstar_jax.sharding import state_shardings
from vstar_jax.tools.launch import open_tools
from vstar_jax.training.checkpoint import Checkpointer


def config_of(checkpoint: str, mesh: str | None, settings: Sequence[str], dataset: str | None = None) -> Config:
    """The config to evaluate with: a run's own, or that of configs/ for a model directory, with `settings` on top.

    dataset: what to evaluate on, the config's own when not given. The lists that a run was trained on stay its own; what a
    model directory was trained on is known only if `settings` say so (data.train). Raises UserError when `checkpoint` is
    neither a run directory nor a model directory.
    """
    path, shipped = Path(checkpoint), config_module.resolve(f"configs/{dataset or 'default'}.yaml")
    example = config_module.load(shipped) if shipped.is_file() else Config()
    if (path / "config.yaml").is_file():
        base = _as_trained(config_module.load(path / "config.yaml"))
        if dataset not in (None, base.data.dataset):
            base = _with_data(base, tokens=_merged(base, example, "tokens"), patches=_merged(base, example, "patches"))
    elif (path / "config.json").is_file():
        base = _with_data(example, train=())
    else:
        raise UserError(
            f"{checkpoint} is neither a run (it has no config.yaml) nor a model directory (no config.json): "
            "give the --run-dir of a training run or a directory in Hugging Face format."
        )
    chosen = [f"--data.dataset={dataset}"] if dataset else []
    config = config_module.parse([*settings, *chosen], base)
    if (path / "config.yaml").is_file():
        config = _with_data(config, train=base.data.train)
    else:
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, path=str(path)))
    return dataclasses.replace(_with_data(config, dialogues=""), mesh=mesh or config.mesh)


def _with_data(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def _as_trained(config: Config) -> Config:
    """A run's config whose training lists name their dataset, so that they stay what they are on another one."""
    return _with_data(config, train=tuple(n if "/" in n else f"{config.data.dataset}/{n}" for n in config.data.train))


def _merged(a: Config, b: Config, name: str) -> tuple[int, ...]:
    return tuple(sorted({*getattr(a.data, name), *getattr(b.data, name)}))


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


UNRELATED = (
    "run_dir",
    "mesh",
    "profile",
    "distributed.",
    "policy.path",
    "data.dir",
    "data.videos",
    "data.threads",
    "data.prompts",
    "data.allow_leakage",
    "sft.",
    "reward.",
    "grpo.",
    "rollout.mode",
    "rollout.deadline",
    "tools.url",
    "tools.failures",
    "evaluation.batch_size",
)
"""Settings that no prediction depends on but for the order of sums, and paths whose content is compared instead."""


def _about(checkpoint: str, config: Config, prompts: Prompts) -> dict[str, Any]:
    """What the predictions depend on: weights, settings and prompts."""
    weights = [*config_module.resolve(config.policy.path).glob("*.safetensors")]
    steps = [path for path in (Path(checkpoint) / "checkpoints").glob("*") if path.name.isdigit()]
    weights += sorted(steps, key=lambda path: int(path.name))[-1:]
    return {
        "checkpoint": str(Path(checkpoint).resolve()),
        "weights": sorted(f"{path.name} of {path.stat().st_mtime_ns}" for path in weights),
        **{s.key: s.value for s in settings_module.settings(config) if not s.key.startswith(UNRELATED)},
        **{f"prompt {name}": text for name, text in dataclasses.asdict(prompts).items()},
    }


def trained_on(checkpoint: str, config: Config) -> str:
    """Where a policy learned, as its row in a table says it."""
    if config.data.train:
        lists = (name if "/" in name else f"{config.data.dataset}/{name}" for name in config.data.train)
        parts = (name.partition("/") for name in lists)
        return ", ".join(f"{TITLES.get(dataset, dataset)} {name}" for dataset, _, name in parts)
    path = Path(checkpoint) / "config.yaml"
    return config_module.load(path).data.dataset if path.is_file() else "not known"


def measure(checkpoint: str, config: Config, mesh: Mesh, out: str | None, seeds: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluates, and in the first process prints the table, and writes result.json, the predictions of every clip as they are
    made, and for recorded datasets table.md and table.json with the paper's rows; returns the result.

    An evaluation that was killed goes on. seeds: folders of finished evaluations of the same policy trained with other seeds,
    whose results are averaged in the paper's table. The other processes return the accuracies alone. Raises UserError when
    clips or novel classes were trained on (`leakage.guard`).
    """
    folder, name = Path(out) if out else Path(checkpoint) / "evaluation", Path(checkpoint).resolve().name
    chat = Chat(config_module.resolve(config.policy.path), config.video)
    with first_alone():
        task = make_task(config, chat)
    others = [_finished(Path(seed), config, task.groups) for seed in seeds]
    leakage = guard(task, config)
    graphdef, state = restore(checkpoint, config, mesh)
    journal = Journal(folder, _about(checkpoint, config, task.prompts)) if first() else None
    with open_tools(config, folder / "tools") as tools:
        predictions = evaluate(graphdef, state, task, chat, tools, config, mesh, name, journal)
    summary = told(summarise(predictions) if first() else {})
    if journal is None:
        return summary
    print_table({name: summary}, title(config))
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "mesh": config.mesh,
        "seed": config.seed,
        "dataset": config.data.dataset,
        "protocol": config.data.protocol,
        "trained_on": trained_on(checkpoint, config),
        "leakage": leakage,
        **summary,
    }
    if config.data.dataset != STICK_MOTION:
        notes = [*leakage["notes"], *_notes(config, summary)]
        row = own_row(name, result["trained_on"], config.data.dataset, [summary, *others], notes)
        text, content = table_of(row)
        (folder / "table.md").write_text(text)
        write_json(folder / "table.json", content)
        print("\n".join([*notes, f"beside the paper's rows: {folder / 'table.md'}"]))
    journal.finish(result)
    return result


def _finished(folder: Path, config: Config, groups: Sequence[str]) -> dict[str, Any]:
    """The result of an evaluation of the same protocol and groups; UserError when there is none."""
    path = folder / "result.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    asked = (config.data.dataset, config.data.protocol, *groups)
    if (found.get("dataset"), found.get("protocol"), *groups_of(found)) != asked:
        raise UserError(f"{folder} has no result of {', '.join(asked)}: give folders that scripts/evaluate.py wrote for it.")
    return found


def _notes(config: Config, summary: Mapping[str, float]) -> list[str]:
    """What a reader of the paper's table must know of this evaluation."""
    notes = []
    if broken := sum(int(summary[f"{group}_unreadable"]) for group in groups_of(summary)):
        notes.append(f"{broken} clips could not be read and count as wrong")
    if limit := config.evaluation.clips_per_action:
        notes.append(f"only the first {limit} clips of each class")
    if config.data.dataset == "kinetics600" and config.data.variant == "vifi":
        notes.append("clips of ViFi-CLIP's lists; the paper's are of the validation split alone")
    return notes
