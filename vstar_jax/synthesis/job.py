"""The whole construction: dialogues for all clips of the training lists, their assessment, the report and the data set.

Everything is on disk as it is made: a run that was stopped or killed goes on where it was, with no clip twice and none lost.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vstar_jax.config import Config, resolve
from vstar_jax.data.assessment import BODY, Item, Rules, assess
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import STICK_MOTION, make_task
from vstar_jax.errors import Interrupted, UserError
from vstar_jax.synthesis import report
from vstar_jax.synthesis.build import Style, Teacher, Unreadable
from vstar_jax.synthesis.endpoint import Endpoint, EndpointError, EndpointSettings, Usage
from vstar_jax.synthesis.prompts import TeacherPrompts
from vstar_jax.synthesis.records import Judgement, Lines, same_run, write_all, write_released
from vstar_jax.tools.launch import open_tools

log = logging.getLogger(__name__)

KEYS = ("SYNTHESIS_API_KEY", "DASHSCOPE_API_KEY", "OPENAI_API_KEY")
"""Environment variables that the key is looked for in."""
HOPELESS = 20
"""Failures in a row, without any success between them, after which the endpoint is taken to be away."""


@dataclass(frozen=True)
class Job:
    """What to make. out: the folder; teacher: who writes; judge: who judges, None for rules alone; limit: of clips, 0 for all;
    prompts: file of the teacher's texts.
    """

    out: Path
    teacher: EndpointSettings
    judge: EndpointSettings | None = None
    style: Style = field(default_factory=Style)
    limit: int = 0
    prompts: str = "configs/synthesis/prompts.yaml"


def run(config: Config, job: Job) -> dict[str, Any]:
    """Makes, assesses and writes: dialogues.jsonl (all), verdicts.jsonl (the judge's), kept.jsonl (the data set), released.json
    (the same in the released format), report.md and report.json. Returns the summary.

    Raises Interrupted after SIGINT or SIGTERM, UserError when the endpoint refuses the key or is away.
    """
    config = replace(config, data=replace(config.data, dialogues=""))  # clips that have none yet are wanted too
    prompts = TeacherPrompts.load(resolve(job.prompts))
    same_run(job.out, _about(config, job, prompts))
    items, judged = Lines(job.out / "dialogues.jsonl", Item), Lines(job.out / "verdicts.jsonl", Judgement)
    task = make_task(config, Chat(resolve(config.policy.path), config.video))
    everything = task.train_records()
    records: dict[str, int] = {}
    for number in range(len(everything)):
        if job.limit and len(records) == job.limit:
            break
        records.setdefault(everything[number].name, number)
    rules = Rules(config.data.dialect, _motions(config))
    usage: dict[str, Any] = {}
    with open_tools(config, job.out / "tools") as tools, ThreadPoolExecutor(job.teacher.concurrency) as executor:

        def work(settings: EndpointSettings) -> tuple[Endpoint, Teacher]:
            endpoint = Endpoint(settings, _key())
            return endpoint, Teacher(task, tools, config, endpoint, prompts, job.style, executor)

        endpoint, teacher = work(job.teacher)
        missing = {name: number for name, number in records.items() if name not in items.found}

        async def make(name: str, number: int) -> None:
            items.add(await teacher.make(everything[number], number))

        lost = _drive("dialogues", make, missing, endpoint, len(records))
        usage["teacher"] = _spent(endpoint.usage, job.teacher)
        if job.judge:
            endpoint, judge = work(job.judge)
            fit = {n: number for n, number in records.items() if n in items.found and assess(items.found[n], rules).kept}
            missing = {name: number for name, number in fit.items() if name not in judged.found}

            async def weigh(name: str, number: int) -> None:
                judged.add(await judge.judge(everything[number], number, items.found[name]))

            lost |= _drive("verdicts", weigh, missing, endpoint, len(fit))
            usage["judge"] = _spent(endpoint.usage, job.judge)
    made = [items.found[name] for name in records if name in items.found]
    return {**finish(job.out, made, judged.found, rules), "usage": usage, "failed": lost}


def finish(out: Path, items: Sequence[Item], judged: Mapping[str, Judgement], rules: Rules) -> dict[str, Any]:
    """Assesses what is there and writes the data set and the report; returns the summary."""
    verdicts = report.assess_all(items, judged, rules)
    kept = [item for item, verdict in zip(items, verdicts, strict=True) if verdict.kept]
    write_all(out / "kept.jsonl", kept)
    write_released(out / "released.json", kept)
    paths = {item.path for item in items}
    summary = report.summarise(verdicts, {path: said for path, said in judged.items() if path in paths})
    report.write(out, summary)
    return summary


def _drive(
    what: str, work: Callable[[str, int], Awaitable[None]], missing: Mapping[str, int], endpoint: Endpoint, total: int
) -> dict[str, str]:
    """Does the work for everything that is missing, so many at a time as the endpoint takes; name -> why it failed."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    failed: dict[str, str] = {}
    waiting = iter(missing.items())
    state = {"row": 0, "signal": 0}

    async def worker(bar: Any) -> None:
        for name, number in waiting:
            try:
                await work(name, number)
                state["row"] = 0
            except (EndpointError, Unreadable) as error:
                log.warning("no %s of %s: %s", what, name, error)
                failed[name] = str(error)
                state["row"] += isinstance(error, EndpointError)
                if state["row"] >= HOPELESS:
                    raise UserError(
                        f"{HOPELESS} clips in a row had no usable reply ({str(error).rstrip('.')}): see that "
                        f"{endpoint.settings.url} works and start again, what was made is kept."
                    ) from None
            usage = endpoint.usage
            cost = round(usage.cost(endpoint.settings.prices), 4)
            bar.set_postfix(failed=len(failed), tokens=usage.prompt + usage.written, cost=cost)
            bar.update()

    async def everything() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop(number: int) -> None:
            state["signal"] = number
            assert task is not None
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(RuntimeError):  # only the main thread is told of signals
                loop.add_signal_handler(number, stop, number)
        try:
            bar = tqdm(total=total, initial=total - len(missing), desc=what, unit="clip", dynamic_ncols=True)
            with logging_redirect_tqdm(), bar:
                async with asyncio.TaskGroup() as group:
                    for _ in range(endpoint.settings.concurrency):
                        group.create_task(worker(bar))
        finally:
            await endpoint.close()

    try:
        asyncio.run(everything())
    except asyncio.CancelledError:
        raise Interrupted(total - len(missing) + len(failed), state["signal"]) from None
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return failed


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _key() -> str:
    return next(filter(None, (os.environ.get(name) for name in KEYS)), "none")


def _motions(config: Config) -> Collection[str]:
    if config.data.dataset != STICK_MOTION:
        return BODY
    from vstar_jax.data.stick_motion.motions import SUB_MOTIONS

    return SUB_MOTIONS


def _spent(usage: Usage, settings: EndpointSettings) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "written_tokens": usage.written,
        "cost": usage.cost(settings.prices),
        "tries": dict(usage.tries),
    }


def _about(config: Config, job: Job, prompts: TeacherPrompts) -> dict[str, Any]:
    """What a dialogue depends on."""
    data = config.data
    return {
        "dataset": data.dataset,
        "lists": list(data.train),
        "dialect": data.dialect,
        "seed": config.seed,
        "model": job.teacher.model,
        "style": asdict(job.style),
        "prompts": asdict(prompts),
        "offered": list(config.tools.offered),
    }
