"""The miniature study: the rows of the paper's ablations (Tables 3 and 4) on StickMotion, over several seeds.

Every row is a file of configs/study on top of full.yaml. Rows that learn the same by SFT share it, one tools server serves all,
and each run is a process of its own whose result stays: a study that was stopped goes on with what is missing. What every run
came to is recorded in a file beside the report, small enough to be kept with the sources: a study goes on from it where the
folders of the runs are not, on another machine too.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from tqdm import tqdm

from vstar_jax import config as config_module
from vstar_jax import settings
from vstar_jax.config import Config
from vstar_jax.data.datasets import glossary
from vstar_jax.data.splits import Spread, spread
from vstar_jax.data.stick_motion.dialogues import decision
from vstar_jax.data.stick_motion.faults import CLEAN
from vstar_jax.errors import UserError
from vstar_jax.evaluation.published import TABLE_3, TABLE_4
from vstar_jax.pages import write_json, write_part
from vstar_jax.tools.launch import serve

FOLDER = config_module.resolve("configs/study")
FULL = "full"
ASSESSED = "assessed"
PHASES = ("after GRPO", "after SFT", "base model")
"""Of a run's result, the last first: what a row is judged by."""
NOT_SFT = (
    "run_dir",
    "profile",
    "distributed.",
    "grpo.",
    "reward.",
    "rollout.",
    "tools.url",
    "tools.counterfactual",
    "tools.failures",
)
"""Settings that SFT does not depend on."""
NOT_RESULT = ("run_dir", "profile", "distributed.", "tools.url")
"""Settings that no result depends on."""


@dataclass(frozen=True)
class Row:
    """A row of the study: name, of its file in configs/study; title; paper, the row of Table 3 or 4 that it repeats, if any;
    counterfactual: the policy of the full row with other tools in evaluation, without training; to: name of the row that it
    is held against, which has all but the one thing.
    """

    name: str
    title: str
    paper: str = ""
    counterfactual: bool = False
    to: str = FULL


ROWS = (
    Row("zero_shot", "base model", "Qwen2.5-VL-3B"),
    Row(FULL, "SFT and RL with tools", "Video-STAR-3B"),
    Row("without_rl", "without RL", "Video-STAR-3B without RL"),
    Row("without_sft", "without SFT", "Video-STAR-3B without SFT"),
    Row("without_tools", "without tools", "Video-STAR-3B without tools"),
    Row("without_sub_motions", "without sub-motions", "Video-STAR-3B without sub-motions"),
    Row("accuracy_and_format", "accuracy and format rewards alone", "RL with accuracy and format rewards alone"),
    Row("without_tool_reward", "without the tool reward", "RL without the tool reward"),
    Row("without_sub_motion_reward", "without the sub-motion reward", "RL without the sub-motion reward"),
    Row("groups_of_2", "groups of 2", "RL with groups of 2"),
    Row("groups_of_6", "groups of 6", "RL with groups of 6"),
    Row("equal_weights", "equal sub-motion weights", "RL with equal sub-motion weights"),
    Row("without_detection", "without person detection", "Video-STAR-3B without person detection"),
    Row("without_pose", "without pose estimation", "Video-STAR-3B without pose estimation"),
    Row("without_explanation", "without action explanation", "Video-STAR-3B without action explanation"),
    Row("without_description", "without video description", "Video-STAR-3B without video description"),
    Row(ASSESSED, "faulty dialogues, assessed"),
    Row("not_assessed", "faulty dialogues, not assessed", "SFT without the data assessment", to=ASSESSED),
    Row("tools_off", "tools off in evaluation", counterfactual=True),
    Row("tools_blank", "tools return nothing", counterfactual=True),
    Row("tools_shuffled", "tools return shuffled results", counterfactual=True),
    Row("tools_other", "tools return another clip's results", counterfactual=True),
)


def row_config(row: Row, seed: int, runs: Path, flags: Sequence[str] = ()) -> Config:
    """The configuration of a row's run; flags: settings on top, for all rows alike."""
    files = [FULL] if row.name == FULL else [FULL, row.name]
    arguments = [f"--config={FOLDER / name}.yaml" for name in files]
    return config_module.parse([*arguments, *flags, f"--seed={seed}", f"--run_dir={runs / row.name / f'seed{seed}'}"])


def run_study(
    rows: Sequence[Row], seeds: Sequence[int], runs: Path, flags: Sequence[str], report: Path, workers: int = 1
) -> None:
    """Runs what is missing of `rows` and writes `report`, Markdown with a plot and a record beside it, after every run: of all
    rows and seeds that have a result.

    runs: the folder of all runs. A run that the record has with the same settings is not missing. workers: runs at a time, each
    on its share of the processor's cores. Raises UserError when a run fails, with the end of what it said.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 0 < workers <= len(cores):
        raise UserError(f"there cannot be {workers} workers on {len(cores)} cores: choose 1 to {len(cores)}.")
    done = collect(seeds, runs, flags, report)
    missing = {seed: [row for row in rows if (row.name, seed) not in done] for seed in seeds}
    if any(missing.values()):
        shares = [set(cores[n::workers]) for n in range(workers)]
        # A run inherits the cores of the thread that starts it.
        pool = ThreadPoolExecutor(workers, initializer=lambda: os.sched_setaffinity(0, shares.pop()))
        with serve(glossary(Config()), runs / "tools") as url:
            study = _Runs(runs, (*flags, f"--tools.url={url}"))
            try:
                futures = [pool.submit(job) for seed, wanted in missing.items() for job in study.jobs(wanted, seed)]
                for future in tqdm(as_completed(futures), desc="study", unit="run", total=len(futures)):
                    future.result()
                    write_report(collect(seeds, runs, flags, report), report)
            finally:
                pool.shutdown(cancel_futures=True)
    write_report(collect(seeds, runs, flags, report), report)


class _Runs:
    """What the study runs, each once: a job that needs another's result does it first, or waits while it is done."""

    def __init__(self, runs: Path, flags: Sequence[str]):
        self.runs, self.flags = runs, flags
        self.busy: defaultdict[Path, Lock] = defaultdict(Lock)

    def jobs(self, rows: Sequence[Row], seed: int) -> Iterator[Callable[[], None]]:
        """What `rows` need: first what they share, last what follows from a row, so that workers seldom wait for each other."""
        ordered = sorted(rows, key=lambda row: row.counterfactual)
        configs = [self._config(row, seed) for row in ordered if not row.counterfactual]
        shared = {_learned(config, self.runs): config for config in configs if config.sft.steps}
        yield from (partial(self._learn, folder, config) for folder, config in shared.items())
        yield from (partial(self._run, row, seed) for row in ordered)

    def _config(self, row: Row, seed: int) -> Config:
        return row_config(row, seed, self.runs, self.flags)

    def _learn(self, folder: Path, config: Config) -> None:
        """SFT as a configuration asks for it."""
        with self.busy[folder]:
            if not (folder / "result.json").exists():
                _train(replace(config, run_dir=str(folder), grpo=replace(config.grpo, steps=0)))

    def _run(self, row: Row, seed: int) -> None:
        config = self._config(row, seed)
        run_dir = Path(config.run_dir)
        with self.busy[run_dir]:
            if (run_dir / "result.json").exists():
                return
            if row.counterfactual:
                self._run(ROWS[1], seed)
                checkpoint = self.runs / FULL / f"seed{seed}" / "grpo"
                _given(config)
                _call(["evaluate.py", f"--checkpoint={checkpoint}", f"--out={run_dir}", *tool_flags(config)], run_dir)
                return
            if config.sft.steps and not (run_dir / "config.yaml").exists():
                # A row goes on from the SFT that it shares; the copy appears as a whole.
                learned = _learned(config, self.runs)
                self._learn(learned, config)
                partial_copy = run_dir.with_name(run_dir.name + ".partial")
                shutil.rmtree(partial_copy, ignore_errors=True)
                for part in ("checkpoints", "rollouts"):
                    shutil.copytree(learned / part, partial_copy / part)
                shutil.copy(learned / "metrics.jsonl", partial_copy)
                shutil.rmtree(run_dir, ignore_errors=True)
                os.replace(partial_copy, run_dir)
            _train(config)


def tool_flags(config: Config) -> list[str]:
    """The flags that give another run the tools of this one."""
    tools = config.tools
    return [
        f"--tools.offered={json.dumps(tools.offered)}",
        f"--tools.counterfactual={tools.counterfactual}",
        f"--tools.url={tools.url}",
    ]


def _learned(config: Config, runs: Path) -> Path:
    """Where the SFT that a configuration asks for is kept."""
    # The dialogues ask for no other tool.
    offered = decision(True, config.tools.offered).chosen()
    return runs / "sft" / _digest(replace(config, tools=replace(config.tools, offered=offered)), NOT_SFT)


def _digest(config: Config, without: tuple[str, ...]) -> str:
    told = {s.key: s.value for s in settings.settings(config) if not s.key.startswith(without)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _train(config: Config) -> None:
    _call(["train.py", f"--config={_given(config)}"], Path(config.run_dir))


def _given(config: Config) -> Path:
    """Leaves the configuration of a run in its folder."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    given = run_dir / "given.yaml"
    config_module.save(config, given)
    return given


def _call(command: Sequence[str], folder: Path) -> None:
    """Runs a script of this project; what it prints stands in log.txt of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    script, *arguments = command
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([sys.executable, str(scripts / script), *arguments], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        said = (folder / "log.txt").read_text().strip().splitlines() or ["it said nothing"]
        raise UserError(f"{script} failed ({said[-1]}): see {folder / 'log.txt'}, then run the study again, it goes on there.")


Results = dict[tuple[str, int], dict[str, Any]]
"""By row and seed: base_top1, novel_top1; assessment, what was dropped of how many dialogues by fault, where a run has it;
settings, a digest of the run's configuration."""


def collect(seeds: Sequence[int], runs: Path, flags: Sequence[str], report: Path) -> Results:
    """What all rows came to, as the folders of their runs tell it, else the record beside `report`.

    seeds: of the folders to look for, besides those that are recorded.

    Raises UserError when a run in its folder was made with other settings: its result is not this study's.
    """
    record = report.with_suffix(".json")
    recorded = json.loads(record.read_text())["runs"] if record.exists() else []
    found = {(r["row"], r["seed"]): {key: r[key] for key in r if key not in ("row", "seed")} for r in recorded}
    seeds = sorted({*seeds, *(seed for _, seed in found)})
    results: Results = {}
    for row, seed in ((row, seed) for seed in seeds for row in ROWS):
        told = _digest(row_config(row, seed, runs, flags), NOT_RESULT)
        if (result := result_of(row, seed, runs)) is not None:
            folder = runs / row.name / f"seed{seed}"
            if _digest(config_module.parse([f"--config={folder / 'given.yaml'}"]), NOT_RESULT) != told:
                raise UserError(
                    f"{folder} was made with other settings: choose another folder with --runs, or remove this one."
                )
            results[row.name, seed] = result | {"settings": told}
        elif found.get((row.name, seed), {}).get("settings") == told:
            results[row.name, seed] = found[row.name, seed]
    return results


def result_of(row: Row, seed: int, runs: Path) -> dict[str, Any] | None:
    """What a run's folder tells of its last phase, None when it is not there yet."""
    path = runs / row.name / f"seed{seed}" / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    last = result if row.counterfactual else next(result[phase] for phase in PHASES if phase in result)
    told = {key: last[key] for key in ("base_top1", "novel_top1")}
    return told | ({"assessment": result["assessment"]} if "assessment" in result else {})


@dataclass(frozen=True)
class Measured:
    """A row over its seeds: base and novel top-1 in percent, the mean difference of novel top-1 to the row that it is held
    against, seed by seed, and the paper's difference, the mean over its columns, in points; None where there is none.
    """

    row: Row
    seeds: int
    base: Spread
    novel: Spread
    difference: Spread | None
    paper: float | None


def measured(results: Results) -> list[Measured]:
    """The rows that have a result for some seed."""
    found: list[Measured] = []
    for row in ROWS:
        of = {seed: result for (name, seed), result in results.items() if name == row.name}
        if not of:
            continue
        pairs = [(r["novel_top1"], results[row.to, seed]["novel_top1"]) for seed, r in of.items() if (row.to, seed) in results]
        base, novel = (spread([100 * r[f"{group}_top1"] for r in of.values()]) for group in ("base", "novel"))
        difference = spread([100 * (a - b) for a, b in pairs]) if pairs and row.name != FULL else None
        found.append(Measured(row, len(of), base, novel, difference, _published(row)))
    return found


def _published(row: Row) -> float | None:
    rows = {r.method: fmean(s.mean for s in r.results.values()) for r in (*TABLE_3, *TABLE_4)}
    return rows[row.paper] - rows[ROWS[1].paper] if row.paper and row.name != FULL else None


def write_report(results: Results, report: Path) -> None:
    """Writes the table as Markdown between the marks of `report`, draws the plot and brings the record up to date."""
    found = measured(results)
    if not found:
        return
    _record(results, report.with_suffix(".json"))
    picture = report.with_suffix(".png")
    table = (*_lines(found), "", f"![Base and novel accuracy of every row]({picture.name})", *_audited(results))
    write_part(report, "study", "\n".join(table))
    _draw(found, picture)


def _record(results: Results, path: Path) -> None:
    """Adds results to the record; what it has of other rows and seeds stays."""
    recorded = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [r for r in recorded if (r["row"], r["seed"]) not in results]
    order = {row.name: n for n, row in enumerate(ROWS)}
    merged = [*others, *({"row": name, "seed": seed, **result} for (name, seed), result in results.items())]
    write_json(path, {"runs": sorted(merged, key=lambda r: (r["seed"], order.get(r["row"], len(order))))})


def _lines(found: Sequence[Measured]) -> Iterator[str]:
    yield "| row | seeds | base top-1 | novel top-1 | novel, difference to the whole | the paper's difference | same sign |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for m in found:
        difference = "" if m.difference is None else _signed(m.difference)
        paper = "" if m.paper is None else f"{m.paper:+.1f}"
        same = "" if m.paper is None or m.difference is None else "yes" if m.paper * m.difference.mean > 0 else "no"
        cells = (m.row.title, str(m.seeds), m.base.text(1), m.novel.text(1), difference, paper, same)
        yield "| " + " | ".join(cells) + " |"


def _audited(results: Results) -> Iterator[str]:
    """What the assessment made of the faults in the dialogues of its row, over the seeds."""
    dropped: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (name, _), result in results.items():
        for fault, (some, every) in result.get("assessment", {}).items() if name == ASSESSED else ():
            dropped[fault] += some
            total[fault] += every
    if not total:
        return
    faults = [fault for fault in total if fault != CLEAN]
    found, there = sum(dropped[f] for f in faults), sum(total[f] for f in faults)
    precision = f"{found / (found + dropped[CLEAN]):.3f}" if found + dropped[CLEAN] else "none dropped"
    yield from (
        "",
        "The assessment of the faulty dialogues, all seeds:",
        "",
        "| fault | dialogues | dropped |",
        "| --- | ---: | ---: |",
    )
    yield from (f"| {fault} | {total[fault]} | {dropped[fault]} |" for fault in (*faults, CLEAN))
    yield from ("", f"Precision {precision}, recall {found / there:.3f}.")


def _signed(value: Spread) -> str:
    return f"{value.mean:+.1f}" + ("" if value.std is None else f" ± {value.std:.1f}")


def _draw(found: Sequence[Measured], path: Path) -> None:
    """Base and novel top-1 of every row, with the standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.36 * len(found) + 1.2), layout="constrained")
    panel = figure.subplots()
    places = list(range(len(found)))[::-1]
    for name, shift, colour in (("base", 0.14, "tab:blue"), ("novel", -0.14, "tab:orange")):
        values = [getattr(m, name) for m in found]
        panel.errorbar(
            [v.mean for v in values],
            [p + shift for p in places],
            xerr=[v.std or 0.0 for v in values],
            fmt="o",
            color=colour,
            label=f"{name} actions",
            capsize=2,
        )
    panel.set_yticks(places, [m.row.title for m in found])
    panel.axvline(100 / Config().data.labels, color="grey", linestyle=":", label="chance")
    panel.set_xlim(-2, 102)
    panel.set_xlabel("top-1 on held-out clips, %; mean and standard deviation over seeds")
    panel.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)  # in the panel it would hide rows
    figure.savefig(path, dpi=120)
