"""Makes the tools server's own miniature YOLO11 models, for poses and for boxes, from nothing, and measures them.

Figures like StickMotion's in all its poses, clean and cluttered, pass through a video file, as the policy's clips do, and
become a YOLO data set that ultralytics trains on. They are measured on held-out clips of StickMotion's own making.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools_server is a program of its own and is not installed

from tools_server import isolation
from tools_server.yolo import WEIGHTS, Task, Yolo
from vstar_jax.data import video
from vstar_jax.data.annotate import LEFT_ANKLE, LEFT_WRIST, RIGHT_ANKLE, RIGHT_WRIST
from vstar_jax.data.builders.stick_motion import SPLITS, render_clip
from vstar_jax.data.stick_motion import motions, render
from vstar_jax.errors import run_script

Clip = tuple[np.ndarray, np.ndarray]
"""Frames uint8 [T, H, W, 3], and keypoints float32 [T, 17, 3] in shares of the side, outside the frame when nobody is there."""

FRAMES_PER_CLIP = 4
CLUTTERED, NOBODY = 0.8, 0.04
"""Shares of clips with clutter, and with clutter and no figure."""
OWN_KEY = 7_000_000
"""Begins the random key of every clip drawn here; StickMotion's begin with its seed, so that none is drawn twice."""
WIDTH, DISTANCES = 0.125, 8
"""Of the architecture: width of its layers, and bins for the distance to a box's side, 16 ordinarily."""
IMAGE_SIZE = 160
TOLERANCE = (0.3, 0.06)
"""Width of the keypoint loss, as COCO's sigmas, in the first and in the last epoch."""
SETTINGS = {
    "imgsz": IMAGE_SIZE,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "cos_lr": True,
    "warmup_epochs": 0.2,
    "pose": 24.0,
    "scale": 0.1,
    "translate": 0.05,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "mosaic": 0.0,
    "close_mosaic": 0,
    "erasing": 0.0,
    "device": "cpu",
    "workers": 0,
    "amp": False,
    "val": False,
    "plots": False,
    "exist_ok": True,
}
"""Of ultralytics' training. Every frame is drawn anew, so little is left to change about it but its side and place."""
HELD_OUT_TAKES = 2
NEAR = (3, 5, 8)
"""Pixels of a 112-pixel frame within which a keypoint counts as found."""
PARTS = {"all": slice(None), "wrists": [LEFT_WRIST, RIGHT_WRIST], "ankles": [LEFT_ANKLE, RIGHT_ANKLE]}


def training_clips(count: int, seed: int, split: str) -> Iterator[Clip]:
    """Clips of any two or three sub-motions, a few frames of each."""
    combinations = [c for length in (2, 3) for c in motions.combinations(length)]
    with tempfile.TemporaryDirectory() as scratch:
        for number in tqdm(range(count), desc=f"draw {split}", unit="clip"):
            rng = np.random.default_rng([OWN_KEY, seed, split == "val", number])
            chosen = combinations[rng.integers(len(combinations))]
            places = np.sort(rng.choice(render.FRAMES, FRAMES_PER_CLIP, replace=False))
            keypoints = motions.keypoints(chosen, render.FRAMES, rng)[places]
            look: render.Look = "cluttered" if rng.random() < CLUTTERED else "clean"
            if rng.random() < NOBODY:
                keypoints, look = keypoints * np.float32(0) + np.array([9, 9, 0], np.float32), "cluttered"
            path = Path(scratch) / "clip.mp4"
            video.write(path, render.render(keypoints, rng, look), render.FPS)
            yield video.read(path, FRAMES_PER_CLIP, exact=FRAMES_PER_CLIP).frames, keypoints


def held_out_clips(look: render.Look) -> Iterator[Clip]:
    """Whole clips of StickMotion's split of novel actions, as its builder draws them with seed 0."""
    split, share = "novel_test", {"clean": 0.0, "cluttered": 1.0}[look]
    with tempfile.TemporaryDirectory() as scratch:
        for action in motions.actions("novel"):
            for take in range(HELD_OUT_TAKES):
                record = render_clip((scratch, (0, list(SPLITS).index(split), action.number, take), share))
                clip = video.read(Path(scratch) / record["video"], render.FRAMES, exact=render.FRAMES)
                yield clip.frames, record["keypoints"] / np.array([render.SIZE, render.SIZE, 1], np.float32)


def write_split(folder: Path, split: str, clips: Iterable[Clip]) -> None:
    """Frames and their labels: one line a frame, or none when nobody is there.

    Frames are BMP files: after decord has been imported, cv2 reads no PNG files any more (their zlib libraries clash).
    """
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number, (frames, keypoints) in enumerate(clips):
        for t, frame in enumerate(frames):
            name = f"{number:06d}-{t:02d}"
            Image.fromarray(frame).save(images / f"{name}.bmp")
            (labels / f"{name}.txt").write_text(label(keypoints[t]))


def label(keypoints: np.ndarray) -> str:
    """YOLO's line for a figure: class, box, keypoints; those outside the frame are marked as not there."""
    seen = keypoints[:, 2:] > 0
    if not seen.any():
        return ""
    left, top, right, bottom = render.boxes(keypoints)
    points = np.where(seen, np.concatenate([keypoints[:, :2], 2 * seen], -1), 0)
    values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, *points.ravel()]
    return " ".join(["0", *(f"{value:.5f}" for value in values)]) + "\n"


def describe(folder: Path) -> Path:
    """Writes what ultralytics must know about the data set in `folder` and returns that file."""
    mirrored = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, motions.JOINTS))]
    train = "images/train" if (folder / "images" / "train").is_dir() else "images/val"
    layout = {"path": str(folder.resolve()), "train": train, "val": "images/val", "names": {0: "person"}}
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({**layout, "kpt_shape": [motions.JOINTS, 3], "flip_idx": mirrored}))
    return file


def train(task: Task, data: Path, start: Path | None, work: Path, epochs: int, seed: int) -> Path:
    """Trains a miniature YOLO11 on the CPU and returns the path of its last checkpoint.

    start: weights to begin from, such as a pose model's for the detector: they share all but the head.
    """
    from ultralytics import YOLO

    architecture = work / f"miniature11-{task}.yaml"
    architecture.write_text(yaml.safe_dump(miniature(task)))
    model = YOLO(architecture, task=task)
    if start:
        model.load(start)
    if task == "pose":
        model.add_callback("on_train_epoch_start", tolerate)
    model.train(data=data, project=str(work.resolve()), name=task, epochs=epochs, seed=seed, **SETTINGS)
    return work / task / "weights" / "last.pt"


def tolerate(trainer: Any) -> None:
    """Sets how far a keypoint may be off in this epoch: far at first, or limbs far from where they mostly are never move.

    The loss flattens out far from the truth. With COCO's narrow widths a raised arm is still drawn hanging after 48,000 frames.
    """
    first, last = TOLERANCE
    width = first * (last / first) ** (trainer.epoch / max(trainer.epochs - 1, 1))
    trainer.model.kpt_oks_sigmas, trainer.model.criterion = [width] * motions.JOINTS, None


def miniature(task: Task) -> dict[str, Any]:
    """The architecture of YOLO11 at an eighth of its full width, with one class."""
    from ultralytics.utils import ROOT, YAML

    name = {"detect": "yolo11.yaml", "pose": "yolo11-pose.yaml"}[task]
    full = YAML.load(ROOT / "cfg" / "models" / "11" / name)
    return {**full, "nc": 1, "reg_max": DISTANCES, "scales": {"n": [0.5, WIDTH, 1024]}, "scale": "n"}


def provide_font() -> None:
    """Puts a font where ultralytics looks for the one that it would fetch from the network to draw with."""
    from matplotlib import get_data_path
    from ultralytics.utils import USER_CONFIG_DIR

    shutil.copy(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", USER_CONFIG_DIR / "Arial.ttf")


def ship(checkpoint: Path, task: Task, out: Path) -> None:
    """Writes the smoothed weights alone, in half precision, with no trace of the machine that trained them."""
    import torch
    import ultralytics
    from ultralytics.nn.tasks import load_checkpoint

    model, _ = load_checkpoint(checkpoint)
    model.args, model.pt_path, model.criterion = {"task": task, "imgsz": IMAGE_SIZE}, out.name, None
    model.yaml["yaml_file"] = f"miniature11-{task}.yaml"
    model.requires_grad_(False)
    torch.save(
        {"model": model.half(), "train_args": model.args, "version": ultralytics.__version__, "license": "AGPL-3.0"}, out
    )


def measure(weights: dict[Task, Path], work: Path) -> dict[str, dict[str, float]]:
    """How well the models do on held-out clips, for each look: average precision, and keypoints in pixels of the frame."""
    return {look: _measure(weights, look, work / "held_out" / look) for look in ("clean", "cluttered")}


def _measure(weights: dict[Task, Path], look: render.Look, folder: Path) -> dict[str, float]:
    from ultralytics import YOLO

    shutil.rmtree(folder, ignore_errors=True)
    clips = list(tqdm(held_out_clips(look), desc=f"draw {look}", unit="clip"))
    write_split(folder, "val", clips)
    options = {"data": describe(folder), "imgsz": IMAGE_SIZE, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    boxes = YOLO(weights["detect"]).val(**options, project=str(folder.resolve()), name="detect").box
    poses = YOLO(weights["pose"]).val(**options, project=str(folder.resolve()), name="pose").pose
    found = {"box mAP50": boxes.map50, "box mAP50-95": boxes.map, "pose mAP50": poses.map50, "pose mAP50-95": poses.map}
    yolo = Yolo(weights["pose"], "pose", device="cpu")
    errors, people = zip(*(_errors(yolo, clip) for clip in clips), strict=True)
    yolo.close()
    pixels = np.concatenate(errors)
    for name, chosen in (
        ("all", slice(None)),
        ("wrists", [LEFT_WRIST, LEFT_WRIST + 1]),
        ("ankles", [LEFT_ANKLE, LEFT_ANKLE + 1]),
    ):
        part = pixels[:, chosen][~np.isnan(pixels[:, chosen])]
        found |= {f"{name} within {near} px": (part <= near).mean() for near in NEAR}
        found |= {f"{name} median px": np.median(part), f"{name} 90 % px": np.percentile(part, 90)}
    found |= {"frames": len(pixels), "people per frame": np.concatenate(people).mean()}
    return {name: round(float(value), 3) for name, value in found.items()}


def _errors(yolo: Yolo, clip: Clip) -> Clip:
    """Distance of each keypoint of the surest person from the truth [T, 17], infinite when not found; how many people [T]."""
    frames, truth = clip
    errors = np.full(truth.shape[:2], np.inf)
    people = yolo.submit(frames, math.inf).result()
    for t, found in enumerate(people):
        if found and found[0].keypoints is not None:
            errors[t] = np.linalg.norm(found[0].keypoints[:, :2] - truth[t, :, :2] * render.SIZE, axis=-1)
    return np.where(truth[..., 2] > 0, errors, np.nan), np.array([len(found) for found in people])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS["pose"].parent, help="where the weights go, and are measured")
    parser.add_argument("--work", type=Path, default=Path("runs/yolo"), help="run directory: data set, checkpoints, measures")
    parser.add_argument("--clips", type=int, default=3000, help=f"clips to draw, {FRAMES_PER_CLIP} frames of each")
    parser.add_argument("--pose-epochs", type=int, default=6, help="passes over the frames for the pose model")
    parser.add_argument("--detect-epochs", type=int, default=2, help="passes for the detector, which begins as the pose model")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    parser.add_argument("--measure", action="store_true", help="only measure the weights that are there")
    arguments = parser.parse_args()

    isolation.ultralytics()
    provide_font()
    weights = {task: arguments.out / path.name for task, path in WEIGHTS.items()}
    if not arguments.measure:
        data = arguments.work / "data"
        shutil.rmtree(data, ignore_errors=True)
        write_split(data, "train", training_clips(arguments.clips, arguments.seed, "train"))
        write_split(data, "val", training_clips(max(arguments.clips // 40, 4), arguments.seed, "val"))
        arguments.out.mkdir(parents=True, exist_ok=True)
        pose = train("pose", describe(data), None, arguments.work, arguments.pose_epochs, arguments.seed)
        ship(pose, "pose", weights["pose"])
        detect = train("detect", describe(data), pose, arguments.work, arguments.detect_epochs, arguments.seed)
        ship(detect, "detect", weights["detect"])
    print(json.dumps(measure(weights, arguments.work), indent=2))


if __name__ == "__main__":
    run_script(main)
