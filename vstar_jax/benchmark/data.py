"""Measures the input pipeline of recorded videos: files in, batches out, in turns with another pipeline, then for a long time.

Ours is training's own: killable decoders, the processor, the chat and grain's threads. The rival is timed only when it makes
the same token ids and the same pictures of the same files; with the same decoder and as many workers, what is left to compare
is all that comes after decoding, and how the clips travel. A turn begins and ends with nothing prefetched.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from vstar_jax import config as config_module
from vstar_jax.batch import Batch, Example
from vstar_jax.benchmark.common import MIB, check_repeats, in_turns, machine, ratios, spread, table
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat, Message
from vstar_jax.data.decoding import Decoder
from vstar_jax.data.patches import TEMPORAL_PATCH, window_order
from vstar_jax.data.pipeline import train_batches
from vstar_jax.data.processor import ProcessedClip
from vstar_jax.data.stick_motion import motions, render
from vstar_jax.dialogue import Prompts, ToolResult, assistant, first_messages, second_messages
from vstar_jax.errors import UserError

SETTINGS = "configs/hmdb51.yaml"
FILES = 16
SIZE, SECONDS, FPS, BITS = (320, 240), 4, 30, 700_000
"""Of a file, much as HMDB-51 has them: width and height in pixels, its length, and bits a second of MPEG-4."""
GREY_LEVELS = 2.01
"""Between two bicubic resizers: torchvision rounds its weights and ours are float32, by which two values can part by a level as
widths are resized and again as heights are; float32 patches add a thousandth.
"""
BLOCK = 1_000
FLAT = 0.05
"""Share by which throughput may fall, and memory differ, over a long run."""
TARGET = 1.5
COMPARED = 4
"""Files that are compared before anything is timed."""
LABELS = (
    *("bend down", "brush hair", "carry a box", "catch a ball", "clap", "climb stairs", "dance", "draw a bow", "drink"),
    *("eat", "fall over", "hug", "jump", "kick a ball", "laugh", "open a door", "pour", "push a cart", "ride a bike"),
    *("run", "shake hands", "sit down", "stand up", "throw a ball", "walk", "wave"),
)
FIRST = (
    "<think>One person is in the middle of the room, and arms and legs can be told apart.</think><pose_estimation>no"
    "</pose_estimation><person_detection>no</person_detection><video_explanation>no</video_explanation>"
    "<noun_explanation>yes</noun_explanation>"
)
SECOND = (
    "<think>[1] Observed body parts and movements:\n- right arm: rises and falls\n- torso: stays upright\n[2] Candidates:\n"
    "- wave\n- clap\n[3] Comparison:\n- wave: 0.9, because a hand goes to and fro\n- clap: 0.2, because the hands do not meet\n"
    "[4] Decision: wave</think><answer>wave</answer>"
)


@dataclass(frozen=True)
class Workload:
    """What is read: `clips` in a turn, in batches of `batch`, by `workers` processes that decode or load.

    threads: of ours, that wait for the processes and prepare what they decoded.
    """

    clips: int
    batch: int
    workers: int
    threads: int


@dataclass(frozen=True)
class Prepared:
    """A clip as a pipeline hands it on: token ids [S], patches [P, 1176] in grey levels and reference order, grid."""

    tokens: np.ndarray
    patches: np.ndarray
    grid: tuple[int, ...]


class Pipeline(Protocol):
    """Files to batches."""

    name: str

    def prepared(self, number: int) -> Prepared:
        """One file alone, for the comparison."""
        ...

    def run(self) -> int:
        """Makes all batches of a turn; the number of clips in them."""
        ...

    def close(self) -> None:
        """Ends its processes."""
        ...


Rival = Callable[[Sequence[Path], Sequence[Message], Config, Workload], Pipeline]


class Ours:
    """`pipeline.train_batches` over files, each with the same dialogue."""

    name = "vstar_jax"

    def __init__(self, paths: Sequence[Path], messages: Sequence[Message], config: Config, work: Workload):
        self.paths, self.messages, self.work = paths, messages, work
        self.chat = Chat(config_module.resolve(config.policy.path), config.video)
        self.decoder = Decoder(work.workers)
        example = self.example(0)
        # One shape for all: files are of one size, and the rival pads to the longest of a batch.
        data = replace(
            config.data, threads=work.threads, tokens=(len(example.tokens),), patches=(len(example.patches),), pack=False
        )
        self.config = replace(config, data=data, sft=replace(config.sft, batch_size=work.batch, accumulate=1))

    def example(self, number: int) -> Example:
        """The dialogue about a file."""
        return self.chat.encode(self.messages, [self._clip(number)])

    def _clip(self, number: int) -> ProcessedClip:
        return self.decoder.process(self.paths[number % len(self.paths)], self.chat.video)

    def batches(self, clips: int) -> Iterator[Batch]:
        """Batches over `clips` clips; after the last one nothing is being read."""
        return train_batches(range(clips), lambda number, _: self.example(number), self.config, epochs=1)

    def run(self) -> int:
        """See `Pipeline`."""
        return sum(len(batch.tokens) for batch in self.batches(self.work.clips))

    def prepared(self, number: int) -> Prepared:
        """See `Pipeline`."""
        example = self.example(number)
        grid = self._clip(number).grid
        patches = np.empty_like(example.patches)
        patches[window_order(grid).order] = example.patches
        return Prepared(example.tokens, patches, grid)

    def close(self) -> None:
        """See `Pipeline`."""
        self.decoder.close()


def write_files(folder: Path, count: int) -> list[Path]:
    """Video files of a figure over clutter, scaled up to the size of HMDB-51's and panned, so that every frame is new."""
    import av

    paths = []
    for number in range(count):
        rng, total = np.random.default_rng(number), round(SECONDS * FPS)
        action = motions.ACTIONS[number % len(motions.ACTIONS)]
        drawn = render.render(motions.keypoints(action.sub_motions, total, rng), rng, "cluttered")
        paths.append(folder / f"{number:03d}.avi")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("mpeg4", rate=FPS)
            (stream.width, stream.height), stream.pix_fmt, stream.bit_rate = SIZE, "yuv420p", BITS
            for n, frame in enumerate(drawn):
                picture = np.roll(np.asarray(Image.fromarray(frame).resize(SIZE)), round(8 * np.sin(n / 9)), 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return paths


def dialogue(config: Config) -> list[Message]:
    """A whole dialogue about one clip, with an explanation of every label."""
    prompts = Prompts.load(config_module.resolve(config.data.prompts))
    told = "\n".join(f"- {label}: a person does it with arms and legs, as the words say." for label in LABELS)
    second = second_messages(prompts, ToolResult(explanation=told), LABELS)
    return [*first_messages(prompts), assistant(FIRST), *second, assistant(SECOND)]


def check_agreement(ours: Pipeline, theirs: Pipeline, count: int) -> float:
    """The largest difference in grey levels between the patches of both; UserError when they do not do the same work."""
    largest = 0.0
    for number in range(count):
        a, b = ours.prepared(number), theirs.prepared(number)
        apart = float(np.abs(a.patches - b.patches).max()) if a.patches.shape == b.patches.shape else np.inf
        same_tokens = np.array_equal(a.tokens, b.tokens)
        if not same_tokens or a.grid != b.grid or apart > GREY_LEVELS:
            words = "equal" if same_tokens else "differ"
            raise UserError(
                f"{ours.name} and {theirs.name} make other inputs of one file (token ids {words}, grids {list(a.grid)} and "
                f"{list(b.grid)}, patches {apart:.2f} grey levels apart), so their speed is not compared: find the cause with "
                "tests/test_processor.py and tests/test_chat.py first."
            )
        largest = max(largest, apart)
    return largest


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    # A child that has ended, as decoders do after so many clips, is counted with its parent.
    return float(times.user + times.system + times.children_user + times.children_system)


def _memory(process: psutil.Process) -> float:
    return float(process.memory_info().rss)


def _family(of: Callable[[psutil.Process], float]) -> float:
    """The sum over this process and its children."""
    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            total += of(process)
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total


def measure_data(repeats: int, work: Workload, soak: int, rival: Rival | None = None, files: int = FILES) -> dict[str, Any]:
    """Times `repeats` turns of each pipeline, then `soak` clips of ours in one go (0 leaves that out).

    Returns what `report` takes. Raises UserError for too few repeats, for clips that are no whole batches, and when the rival
    makes other inputs.
    """
    check_repeats(repeats)
    if work.clips % work.batch:
        raise UserError(f"{work.clips} clips are no whole batches of {work.batch}: give a multiple.")
    config = config_module.load(config_module.resolve(SETTINGS))
    messages, cores = dialogue(config), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), files)
        with ExitStack() as stack:
            makers = [Ours, *([rival] if rival else [])]
            ours, *others = [stack.enter_context(closing(make(paths, messages, config, work))) for make in makers]
            differences = [check_agreement(ours, other, min(COMPARED, files)) for other in others]
            example = ours.prepared(0)
            seconds, cpu = _turns([ours, *others], work.clips, repeats)
        with closing(Ours(paths, messages, config, work)) as alone:
            blocks = measure_soak(alone, soak) if soak else None
    return {
        "what": "data",
        "model": config.data.dataset,
        "machine": machine(),
        "cores": cores,
        "clips": work.clips,
        "batch": work.batch,
        "workers": work.workers,
        "threads": work.threads,
        "size": [*SIZE],
        "file_frames": round(SECONDS * FPS),
        "frames": TEMPORAL_PATCH * example.grid[0],
        "patches": len(example.patches),
        "tokens": len(example.tokens),
        "difference_levels": max(differences, default=None),
        "contenders": {
            name: {
                "seconds": taken,
                "clips_per_s_per_core": work.clips / float(np.median(taken)) / cores,
                "cpu_seconds_per_clip": [c / work.clips for c in cpu[name]],
            }
            for name, taken in seconds.items()
        },
        "ratios": [r for other in others for r in ratios(seconds[ours.name], seconds[other.name])],
        "cpu_ratios": [r for other in others for r in ratios(cpu[ours.name], cpu[other.name])],
        "soak": blocks,
    }


def _turns(pipelines: Sequence[Pipeline], clips: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each turn by the clock, and of processor time."""
    cpu: dict[str, list[float]] = {pipeline.name: [] for pipeline in pipelines}

    def turn(pipeline: Pipeline) -> None:
        before = _family(_cpu)
        made = pipeline.run()
        cpu[pipeline.name].append(_family(_cpu) - before)
        if made != clips:
            raise RuntimeError(f"{pipeline.name} made {made} clips in the place of {clips}.")

    for pipeline in pipelines:
        pipeline.run()  # starts the workers
    return in_turns({pipeline.name: partial(turn, pipeline) for pipeline in pipelines}, repeats), cpu


def measure_soak(ours: Ours, clips: int, block: int = BLOCK) -> dict[str, Any]:
    """Throughput and memory of `clips` clips in one go, by blocks, of which there are four at least.

    Memory, in MiB, is what this process and its workers hold, the mean over a block's batches. `change` and `range` leave the
    first block out, in which buffers fill: the second half over the first, and the most over the least, less one.
    """
    batch = ours.work.batch
    block = max(min(block, clips // 4) // batch, 1) * batch
    blocks = max(clips // block, 4)
    batches = ours.batches(blocks * block)
    rates, memory = [], []
    with tqdm(total=blocks * block, desc="soak", unit="clip", leave=False) as bar:
        for _ in range(blocks):
            held, started = [], time.perf_counter()
            for _ in range(block // batch):
                next(batches)
                held.append(_family(_memory) / MIB)
                bar.update(batch)
            rates.append(block / (time.perf_counter() - started))
            memory.append(float(np.mean(held)))
    return {
        "clips": blocks * block,
        "block": block,
        "clips_per_s": rates,
        "memory_mib": memory,
        "throughput_change": _change(rates[1:]),
        "memory_change": _change(memory[1:]),
        "memory_range": max(memory[1:]) / min(memory[1:]) - 1,
    }


def _change(values: Sequence[float]) -> float:
    half = len(values) // 2
    return float(np.mean(values[-half:]) / np.mean(values[:half]) - 1)


def report(result: dict[str, Any]) -> str:
    """The result of a measurement as Markdown."""
    contenders, (width, height) = result["contenders"], result["size"]
    rows = {
        f"seconds for {result['clips']} clips": [spread(c["seconds"], ".2f") for c in contenders.values()],
        "clips/s per core": [f"{c['clips_per_s_per_core']:.2f}" for c in contenders.values()],
        "processor milliseconds of a clip": [
            spread([1e3 * s for s in c["cpu_seconds_per_clip"]], ".0f") for c in contenders.values()
        ],
    }
    text = (
        f"Video files (MPEG-4) of {width} x {height} pixels and {result['file_frames']} frames to {result['frames']} frames, "
        f"{result['patches']:,} patches and {result['tokens']:,} tokens with the settings of {result['model']}, in batches of "
        f"{result['batch']}, {result['workers']} workers and {result['threads']} threads of ours ({result['machine']}); "
        f"median (min to max) of {len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += table(list(contenders), rows)
    if result["ratios"]:
        ours, theirs = contenders
        text += (
            f"\n{ours} is {spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat (target {TARGET:g}); "
            f"by processor time {spread(result['cpu_ratios'], '.2f')} times. Token ids are equal, and patches "
            f"{result['difference_levels']:.2f} grey levels apart at most.\n"
        )
    if soak := result["soak"]:
        text += (
            f"\n{soak['clips']:,} clips in one go, by {soak['block']:,}: from the second block on throughput changed by "
            f"{soak['throughput_change']:+.1%} and memory by {soak['memory_change']:+.1%} from the first half to the second; "
            f"the most memory was {soak['memory_range']:.1%} above the least (target {FLAT:.0%}).\n\n"
        )
        cells = zip(soak["clips_per_s"], soak["memory_mib"], strict=True)
        blocks = {f"{(n + 1) * soak['block']:,}": [f"{rate:.1f}", f"{held:,.0f}"] for n, (rate, held) in enumerate(cells)}
        text += table(["clips/s", "memory, MiB"], blocks)
    return text
