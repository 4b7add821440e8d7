"""YOLO on clips: people's boxes or poses in uint8 frames, one model behind one thread that many callers share.

ultralytics gives the model, its input and the suppression of double finds; its predictor is left out, because it opens paths
and addresses, shares its settings between threads, and drops boxes when a clock says so. A frame's answer depends on that
frame alone: frames meet only others of their own size, and every batch is filled up to the same count.
"""

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tools_server import isolation
from tools_server.batcher import Batcher

Task = Literal["detect", "pose"]

ASSETS = Path(__file__).parent / "assets"
WEIGHTS: dict[Task, Path] = {"detect": ASSETS / "figures-detect.pt", "pose": ASSETS / "figures-pose.pt"}
"""The models that come with the server; they see StickMotion's figures, not real people."""
KEYPOINTS = (17, 3)
OVERLAP = 0.7
"""Boxes that share more than this of their union are one person."""
MOST_PEOPLE = 100


class YoloError(Exception):
    """Weights that cannot be used, or a batch that could not be computed or trusted."""


@dataclass(frozen=True)
class Person:
    """One person in one frame.

    box: left, top, right, bottom in pixels; keypoints: float32 [17, 3] in COCO order, x and y in pixels and confidence, None
    from the detector.
    """

    box: tuple[float, float, float, float]
    confidence: float
    keypoints: np.ndarray | None


class Yolo:
    """One model, the thread that owns it, and the queue before it.

    weights: a local .pt file of ultralytics; device: auto (CUDA if there is one), cpu, cuda, cuda:1 and so on; confidence: of a
    person, at least; image_size: longer side of the model's input, None for what the weights were trained with; batch: frames a
    call, wait_ms: for which a batch waits to be filled; queue: most frames that may wait; threads: of torch on the CPU, for the
    whole process, None leaves them; on_batch: told the frames and the seconds of each call, in the owner's thread.
    Computes in half precision on CUDA, in single precision elsewhere. Raises YoloError for weights that cannot be used.

    digest: changes with the weights and with everything else that changes results; device, name: for people.
    """

    def __init__(
        self,
        weights: Path,
        task: Task,
        *,
        device: str = "auto",
        confidence: float = 0.25,
        image_size: int | None = None,
        batch: int = 16,
        wait_ms: float = 2.0,
        queue: int = 4096,
        threads: int | None = None,
        on_batch: Callable[[int, float], None] | None = None,
    ):
        if not Path(weights).is_file():
            raise YoloError(f"there are no weights at {weights}: give the path of a local .pt file, none is ever downloaded.")
        isolation.ultralytics()
        import torch
        import torchvision  # noqa: F401  ultralytics suppresses double finds with it when it is there, else slowly
        import ultralytics
        from ultralytics.data.augment import LetterBox

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = _device(device)
        self._half = self._device.type == "cuda"
        model, trained_size = _load(Path(weights), task)
        self._person = _person_class(Path(weights), model.names)
        self._model = (model.half() if self._half else model).to(self._device, memory_format=torch.channels_last)
        stride = max(int(model.stride.max()), 32)
        size = math.ceil((image_size or trained_size) / stride) * stride
        self._fit = LetterBox(size, auto=True, stride=stride)
        self._task, self._confidence, self._batch = task, confidence, batch
        self.device, self.name = str(self._device), Path(weights).name
        facts = {
            "weights": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
            "task": task,
            "size": size,
            "confidence": confidence,
            "precision": "float16" if self._half else "float32",
            "device": self._device.type,
            "batch": batch,
            "versions": [ultralytics.__version__, str(torch.__version__)],
        }
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._predict([np.zeros((size, size, 3), np.uint8)])  # the first call is slow, and shows what is broken
        self._batcher = Batcher[np.ndarray, list[Person]](
            self._predict, batch=batch, wait_ms=wait_ms, capacity=queue, name=f"yolo-{task}", on_batch=on_batch
        )

    @property
    def queue_size(self) -> int:
        """Frames that wait for the model."""
        return self._batcher.queue_size

    def submit(self, frames: np.ndarray, deadline: float) -> "Future[list[list[Person]]]":
        """The people in each of `frames`, uint8 [T, H, W, 3] in RGB, the surest first.

        The frames must not change before the answer. deadline: a `time.monotonic()` time, after which the future fails with
        TimeoutError; it fails with YoloError when the model does. A cancelled future's frames leave the queue. Raises
        queue.Full when too many frames wait, ValueError for frames of another kind, RuntimeError after `close`.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}.")
        return self._batcher.submit(list(frames), frames.shape[1:], deadline)

    def close(self) -> None:
        """Finishes the accepted work, then stops the model's thread."""
        self._batcher.close()

    def _predict(self, frames: list[np.ndarray]) -> list[list[Person]]:
        """Runs the model on up to a batch of frames uint8 [H, W, 3] of the same shape."""
        import torch
        from ultralytics.utils.nms import non_max_suppression

        inputs = np.stack([np.asarray(self._fit(image=frame)) for frame in frames])
        padded = np.zeros((self._batch, *inputs.shape[1:]), np.uint8)
        padded[: len(frames)] = inputs
        try:
            with torch.inference_mode():
                images = torch.from_numpy(padded).to(self._device).permute(0, 3, 1, 2)  # a view: channels last
                raw = self._model((images.half() if self._half else images.float()) / 255)[0][: len(frames)].float()
                if not raw.isfinite().all():
                    raise YoloError(f"{self.name} gave numbers that are not finite: no box of this batch can be trusted.")
                found = non_max_suppression(
                    raw,
                    self._confidence,
                    OVERLAP,
                    classes=[self._person],
                    nc=len(self._model.names),
                    max_det=MOST_PEOPLE,
                    max_time_img=math.inf,  # else a slow moment silently empties the rest of the batch
                    end2end=getattr(self._model, "end2end", False),
                )
        except RuntimeError as error:
            raise YoloError(f"{self.name} failed on a batch of {len(frames)} frames: {error}") from error
        return [self._people(rows, frame, inputs.shape[1:3]) for rows, frame in zip(found, frames, strict=True)]

    def _people(self, rows: Any, frame: np.ndarray, shape: Any) -> list[Person]:
        """Finds float [N, 6 + 51] at the model's input -> people in the frame's pixels."""
        from ultralytics.utils.ops import scale_boxes, scale_coords

        rows = rows.cpu().clone()  # the two functions below write into their input
        boxes = scale_boxes(shape, rows[:, :4], frame.shape).tolist()
        poses: list[np.ndarray | None] = [None] * len(rows)
        if self._task == "pose":
            poses = list(scale_coords(shape, rows[:, 6:].reshape(-1, *KEYPOINTS), frame.shape).numpy())
        return [Person(tuple(b), c, k) for b, c, k in zip(boxes, rows[:, 4].tolist(), poses, strict=True)]


def _device(wanted: str) -> Any:
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise YoloError(
            f"the device {wanted} cannot be used ({_line(error)}): choose auto, cpu or a device that is there."
        ) from error
    return device


def _load(weights: Path, task: Task) -> tuple[Any, int]:
    """The model, ready to be asked, and the image size it was trained with."""
    from ultralytics.nn.tasks import load_checkpoint

    try:
        model, _ = load_checkpoint(weights.resolve(), fuse=True)
    except Exception as error:  # a damaged file fails in many ways, and a .pt file can hold anything
        raise YoloError(
            f"{weights} cannot be read as YOLO weights ({_line(error)}): give a .pt file of ultralytics."
        ) from error
    if model.task != task:
        raise YoloError(f"{weights} is a model for the task {model.task}: give weights for the task {task}.")
    shape = tuple(getattr(model, "kpt_shape", KEYPOINTS))
    if task == "pose" and shape != KEYPOINTS:
        raise YoloError(f"{weights} finds keypoints of shape {shape}: give a pose model for COCO's {KEYPOINTS}.")
    return model.eval().requires_grad_(False), int(model.args.get("imgsz") or 640)


def _person_class(weights: Path, names: dict[int, str]) -> int:
    for number, name in names.items():
        if name == "person":
            return number
    known = ", ".join(list(names.values())[:5])
    raise YoloError(f"{weights} knows no person, only {known}: give weights that find people.")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
