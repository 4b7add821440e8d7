"""Measures how fast this project is on this machine, alone or in turns with another implementation of the same work."""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_jax import huge_pages
from vstar_jax.errors import UserError, run_script

if TYPE_CHECKING:
    from vstar_jax.benchmark.size import Size
    from vstar_jax.tools.client import ToolsClient

RIVALS = {"sft": ("hf",), "rollout": ("hf",), "grpo": ("trl",), "tools": ("ultralytics",), "data": ("torch",)}
"""Measurement -> the implementations that it can be compared with."""
NEEDED = {
    "hf": ("torch", "pip install -e '.[test]'"),
    "torch": ("torchvision", "pip install -e '.[data,test]'"),
    "trl": ("trl", "pip install trl"),
    "ultralytics": ("ultralytics", "pip install -e '.[tools,yolo]'"),
}
"""Rival -> the module that it needs, and how to get it."""
ALL = "all"
LARGE = ("3b", "7b")
REPEATS = 7


def main() -> None:
    arguments = _arguments()
    what, against = arguments.what, arguments.against
    if what not in (*RIVALS, ALL):
        raise UserError(f"there is no benchmark {what!r}: choose one of {', '.join((*RIVALS, ALL))}.")
    known = RIVALS[what] if what != ALL else tuple(NEEDED)
    if against is not None and against not in known:
        raise UserError(
            f"there is no comparison of {what} with {against!r}: give {' or '.join(known)}, or leave --against out."
        )
    if against is not None and importlib.util.find_spec(NEEDED[against][0]) is None:
        module, command = NEEDED[against]
        raise UserError(f"--against={against} needs {module}, which is not installed: {command}, or leave --against out.")
    if what == ALL:
        from vstar_jax.benchmark import everything

        command = [sys.executable, str(Path(__file__).resolve()), *everything.shared_flags(sys.argv[1:])]
        everything.run(command, arguments.model, RIVALS, against, arguments.out)
        return
    if against is not None:  # the rival's memory is on the same device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    elif arguments.model in LARGE:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

    from vstar_jax.benchmark import common

    result, text = _measured(arguments)
    print(text)
    common.write(result, text, arguments.out)


def _measured(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result and its Markdown; UserError when the device has too little memory."""
    try:
        return MEASURES[arguments.what](arguments)
    except RuntimeError as error:  # of JAX, and of PyTorch, which must not be imported for it
        if "RESOURCE_EXHAUSTED" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise UserError(
            "the device's memory is full: take fewer rows (--batch-size, --prompts, --group), --remat=full or "
            "--param-dtype=bfloat16, or leave --against out."
        ) from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--what",
        default="sft",
        help="what is measured: sft, rollout or grpo (steps of training), tools, data, or all of them one after the other",
    )
    parser.add_argument(
        "--against",
        default=None,
        help="hf (sft, rollout; CPU or GPU), trl (grpo), ultralytics (tools) or torch (data), on the CPU; "
        "with --what=all, those that know the rival are compared",
    )
    parser.add_argument(
        "--model", default="small", help="tiny, small, medium, 3b or 7b, with random weights; not for tools and data"
    )
    computed = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=computed, help="activations and products: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--param-dtype", choices=computed, help="parameters and moments: float32, and bfloat16 for 7b")
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), help="what the backward pass recomputes: full for 3b and 7b"
    )
    parser.add_argument("--frames", type=_count, help="frames of a clip (16)")
    parser.add_argument("--pixels", type=_count, help="most pixels of a frame: 3136, and 100352 for 3b and 7b")
    parser.add_argument("--batch-size", type=_count, help="sft: dialogues of two clips (8; 4 for 3b and 7b); data: clips (4)")
    parser.add_argument("--prompts", type=_count, default=8, help="rollout, grpo: prompts")
    parser.add_argument("--group", type=_count, default=4, help="rollout, grpo: replies to each prompt")
    parser.add_argument("--tokens", type=_count, help="rollout, grpo: tokens of each reply (64; 256 for 3b and 7b)")
    parser.add_argument("--clips", type=_count, help="tools: clips of 16 frames in a call (32); data: clips in a turn (256)")
    parser.add_argument("--calls", type=_count, default=500, help="tools: cached calls whose latency is measured")
    parser.add_argument("--threads", type=_count, help="tools: callers at once (8); data: threads of ours (as the workers)")
    parser.add_argument("--workers", type=_count, help="data: processes that decode or load; as many as there are cores")
    parser.add_argument("--soak", type=_size, default=10_000, help="data: clips that are read in one go at the end; 0 for none")
    parser.add_argument("--no-tools", action="store_true", help="rollout: leave out the part with a tools server")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed repeats of each implementation")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder of the result, as JSON and Markdown")
    return parser.parse_args()


def _model_size(arguments: argparse.Namespace) -> "Size":
    from vstar_jax.benchmark.size import Size

    given = (arguments.dtype, arguments.param_dtype, arguments.remat, arguments.frames, arguments.pixels)
    return Size.of(arguments.model, *given)


def _count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _size(text: str) -> int:
    """A whole number, which may be 0."""
    return 0 if text == "0" else _count(text)


def _sft(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vstar_jax.benchmark import sft

    rival = None
    if arguments.against:
        import reference_hf

        rival = reference_hf.HuggingFace
    result = sft.measure_sft(_model_size(arguments), arguments.batch_size, arguments.repeats, rival)
    return result, sft.report(result)


def _rollout(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vstar_jax.benchmark import rollout

    rival = None
    if arguments.against:
        import reference_hf

        rival = reference_hf.Generation
    size = _model_size(arguments)
    work = rollout.Workload(arguments.prompts, arguments.group, arguments.tokens or size.tokens)
    result = rollout.measure_rollout(size, work, arguments.repeats, rival)
    text = rollout.report(result)
    if arguments.model in LARGE:  # what the host costs is measured where the model does not hide it
        return result, text

    from vstar_jax.benchmark import drivers, everything

    result["drivers"] = drivers.measure_drivers(size, work, arguments.repeats)
    text += f"\n{drivers.report(result['drivers'])}"
    result["tools"], missing = None, everything.missing("tools")
    if missing and not arguments.no_tools:
        text += f"\nWithout the part with a tools server: {missing}\n"
    elif not arguments.no_tools:
        from vstar_jax.benchmark import waiting
        from vstar_jax.data.stick_motion.names import glossary

        with _client(glossary()) as client:
            result["tools"] = waiting.measure_waiting(client, work, arguments.repeats)
        text += f"\n{waiting.report(result['tools'])}"
    return result, text


def _grpo(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vstar_jax.benchmark import grpo
    from vstar_jax.benchmark.rollout import Workload
    from vstar_jax.config import PolicyConfig, resolve

    rival = None
    if arguments.against:
        import reference_trl

        rival = reference_trl.Trl
    size = _model_size(arguments)
    work = Workload(arguments.prompts, arguments.group, arguments.tokens or size.tokens)
    result = grpo.measure_grpo(size, work, arguments.repeats, rival, resolve(PolicyConfig().path))
    return result, grpo.report(result)


def _tools(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the server is not a part of the installed package
    from tools_server.yolo import WEIGHTS
    from vstar_jax.benchmark import tools

    rival = None
    if arguments.against:
        import reference_yolo

        rival = reference_yolo.InProcess(WEIGHTS["pose"])
    with _client({}) as client:
        result = tools.measure_tools(
            client,
            arguments.repeats,
            arguments.clips or 32,
            arguments.calls,
            arguments.threads or 8,
            WEIGHTS["pose"].stem,
            rival,
        )
    return result, tools.report(result)


def _data(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vstar_jax.benchmark import data

    rival = None
    if arguments.against:
        import reference_torch

        rival = reference_torch.Torch
    workers = arguments.workers or len(os.sched_getaffinity(0))
    work = data.Workload(arguments.clips or 256, arguments.batch_size or 4, workers, arguments.threads or workers)
    result = data.measure_data(arguments.repeats, work, arguments.soak, rival)
    return result, data.report(result)


@contextmanager
def _client(glossary: Mapping[str, str]) -> Iterator["ToolsClient"]:
    """A client of a tools server that is started for the measurement, with an empty cache."""
    from vstar_jax.tools.client import ToolsClient
    from vstar_jax.tools.launch import serve

    with tempfile.TemporaryDirectory() as folder, serve(glossary, Path(folder)) as url:
        client = ToolsClient(url)
        try:
            yield client
        finally:
            client.close()


MEASURES: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
    "sft": _sft,
    "rollout": _rollout,
    "grpo": _grpo,
    "tools": _tools,
    "data": _data,
}


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
