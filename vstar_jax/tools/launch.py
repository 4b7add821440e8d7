"""Opens the tools that a run's settings ask for: annotations, a tools server that runs, or one that is started for the run.

The server is a process of its own, with its own dependencies; it ends with the run, however that ends.
"""

import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from vstar_jax.config import Config
from vstar_jax.data.datasets import STICK_MOTION, glossary
from vstar_jax.errors import UserError
from vstar_jax.tools.client import ToolsClient
from vstar_jax.tools.counterfactual import Counterfactual
from vstar_jax.tools.host import Tools, annotations
from vstar_jax.tools.served import ServedTools

TOKEN = "TOOLS_TOKEN"
"""Environment variable with the bearer token of a server on another machine."""
NEEDED = {
    "tools": ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client", "mcp", "PIL"),
    "yolo": ("ultralytics", "torch", "torchvision"),
}
"""Extra of this package -> the modules that the server imports."""
START_SECONDS = 180.0
"""Until the server has loaded its models, on a slow disk for the first time."""
STOP_SECONDS = 10.0
PROJECT = Path(__file__).resolve().parents[2]
ELSE = "give the address of a server that runs with tools.url, or set tools.source=annotations"


@contextmanager
def open_tools(config: Config, folder: Path) -> Iterator[Tools]:
    """The tools of a run, as long as the context lasts, or what its counterfactual makes of them.

    folder: for the log and the cache of a server that is started here; every process of a run starts its own. Raises UserError
    when there is no server at tools.url, none can be started, or the one that would be started cannot see people in videos.
    """
    with _opened(config, folder) as tools:
        kind = config.tools.counterfactual
        yield tools if kind == "none" else Counterfactual(tools, kind)


@contextmanager
def _opened(config: Config, folder: Path) -> Iterator[Tools]:
    url = config.tools.url
    if config.tools.source == "annotations":
        yield annotations
    elif url:
        with _client(url) as client:
            if not client.ready():
                raise UserError(
                    f"no tools server answers at tools.url {url}: start one with python -m tools_server, or leave tools.url "
                    "empty to have one started."
                )
            yield ServedTools(client)
    elif config.data.dataset != STICK_MOTION:
        raise UserError(
            f"the tools server that a run starts sees stick figures alone, not the people of {config.data.dataset}: start one "
            "with YOLO11's weights (python -m tools_server --yolo.detect=yolo11x.pt --yolo.pose=yolo11x-pose.pt) and give its "
            "address with tools.url, or go without visual tools with tools.source=annotations."
        )
    else:
        with serve(glossary(config), _own(folder)) as started, _client(started) as client:
            yield ServedTools(client)


def _own(folder: Path) -> Path:
    return folder / f"process{jax.process_index()}" if jax.process_count() > 1 else folder


@contextmanager
def _client(url: str) -> Iterator[ToolsClient]:
    try:
        client = ToolsClient(url, token=os.environ.get(TOKEN))
    except ValueError as error:
        raise UserError(f"tools.url: {error}") from None
    try:
        yield client
    finally:
        client.close()


@contextmanager
def serve(glossary: Mapping[str, str], folder: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Runs `python -m tools_server` on a free port of this machine and gives its address; it ends with the context.

    flags: more of the server's own. Raises UserError when its dependencies are missing or it does not start.
    """
    missing = {extra: [name for name in names if not importlib.util.find_spec(name)] for extra, names in NEEDED.items()}
    if absent := [name for names in missing.values() for name in names]:
        extras = ",".join(extra for extra, names in missing.items() if names)
        raise UserError(
            f"the tools server cannot start because {', '.join(absent)} is not installed: pip install -e '.[{extras}]', {ELSE}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "glossary.json").write_text(json.dumps(dict(glossary), indent=0))
    log = folder / "server.log"
    command = [sys.executable, "-m", "tools_server", "--port=0", "--exit-with-parent", "--mcp=false"]
    command += [f"--cache.path={(folder / 'cache.sqlite').absolute()}"]
    command += [f"--glossary={(folder / 'glossary.json').absolute()}"] if glossary else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))}
    with log.open("w") as written:
        # A session of its own: Ctrl-C stops the run, which finishes its step with the tools and then stops them.
        process = subprocess.Popen(
            [*command, *flags],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            start_new_session=True,
        )
    try:
        yield _address(process, log)
    finally:
        _stop(process)


def _address(process: "subprocess.Popen[str]", log: Path) -> str:
    """Where the server says that it listens."""
    assert process.stdout is not None
    until = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        greeting = process.stdout.readline() if selector.select(max(until - time.monotonic(), 0)) else ""
    if found := re.search(r"https?://\S+", greeting):
        print(greeting.strip(), flush=True)
        return found[0]
    said = [line for line in log.read_text().splitlines() if line.strip()]
    reason = said[-1].removeprefix("error: ").rstrip(".") if said else f"it said nothing in {START_SECONDS:.0f} seconds"
    raise UserError(f"the tools server did not start ({reason}): see {log}, {ELSE}.")


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
