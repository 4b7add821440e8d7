"""The TFDS builder of StickMotion: renders real mp4 files with ground-truth pose and boxes, in array_record."""

import dataclasses
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from filelock import FileLock
from tqdm import tqdm

from vstar_jax.data.stick_motion import motions, render
from vstar_jax.data.video import write

SPLITS = {"train": "base", "base_test": "base", "novel_test": "novel"}
CLUTTERED_SHARE = {"clean": 0.0, "mixed": 0.75, "cluttered": 1.0}
TEST_CLIPS = {"base_test": 4, "novel_test": 8}
"""Held-out clips of each action."""
PROCESSES = 2


@dataclasses.dataclass(kw_only=True)
class StickMotionConfig(tfds.core.BuilderConfig):
    """Which StickMotion: backgrounds, training clips of each base action, and the seed of everything drawn."""

    name: str = ""
    difficulty: str = "mixed"
    clips_per_action: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        self.name = f"{self.difficulty}-{self.clips_per_action}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One rendered clip.

    name: the file's name, for logs only; video: its path; action: what is shown; cluttered: whether clutter hides the figure;
    fps: frames a second; keypoints float32 [T, 17, 3] and boxes float32 [T, 1, 4] in pixels, as `annotate` takes them.
    """

    name: str
    video: Path
    action: motions.Action
    cluttered: bool
    fps: float
    keypoints: np.ndarray
    boxes: np.ndarray

    @property
    def label(self) -> str:
        """What is shown, for result files: the names that a policy reads are drawn anew for every episode."""
        return f"action {self.action.number}"


class Records(Sequence[Record]):
    """Random access to a prepared split, in a fixed order."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self.folder = Path(builder.data_dir)
        self.source = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = self.source[range(len(self))[index]]
        video = self.folder / found["video"].decode()
        return Record(
            name=video.stem,
            video=video,
            action=motions.ACTIONS[int(found["action"])],
            cluttered=bool(found["cluttered"]),
            fps=float(found["fps"]),
            keypoints=found["keypoints"],
            boxes=found["boxes"],
        )


class StickMotion(tfds.core.GeneratorBasedBuilder):
    """Clips of an articulated figure that performs two or three sub-motions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        frames, joints = render.FRAMES, motions.JOINTS
        features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Text(),
                "action": np.int64,
                "cluttered": np.bool_,
                "fps": np.float32,
                "keypoints": tfds.features.Tensor(shape=(frames, joints, 3), dtype=np.float32),
                "boxes": tfds.features.Tensor(shape=(frames, 1, 4), dtype=np.float32),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Renders the split's clips in two processes; files land beside the records and are renamed with them."""
        config = self.builder_config
        per_action = TEST_CLIPS.get(split, config.clips_per_action)
        folder = Path(self.data_dir) / "videos" / split
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            (str(folder), (config.seed, list(SPLITS).index(split), action.number, take), CLUTTERED_SHARE[config.difficulty])
            for take in range(per_action)
            for action in motions.actions(SPLITS[split])  # type: ignore[arg-type]
        ]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            rendered = pool.imap(render_clip, jobs, chunksize=8)
            for record in tqdm(rendered, total=len(jobs), desc=f"render StickMotion {split}", unit="clip"):
                yield record["video"], {**record, "video": f"videos/{split}/{record['video']}"}


def render_clip(job: tuple[str, Sequence[int], float]) -> dict[str, Any]:
    """Draws one clip and writes its mp4 file into a folder; returns its record with the file's name alone."""
    folder, key, cluttered_share = job
    rng = np.random.default_rng(list(key))
    action, take = motions.ACTIONS[key[2]], key[3]
    cluttered = bool(rng.random() < cluttered_share)
    keypoints = motions.keypoints(action.sub_motions, render.FRAMES, rng)
    frames = render.render(keypoints, rng, "cluttered" if cluttered else "clean")
    name = f"clip-{action.number:03d}-{take:04d}.mp4"
    write(Path(folder) / name, frames, render.FPS)
    pixels = np.array([render.SIZE, render.SIZE, 1], np.float32)
    return {
        "video": name,
        "action": action.number,
        "cluttered": cluttered,
        "fps": render.FPS,
        "keypoints": keypoints * pixels,
        "boxes": render.boxes(keypoints[:, None]) * render.SIZE,
    }


def prepare(data_dir: str | Path, difficulty: str, clips_per_action: int, seed: int) -> StickMotion:
    """The builder under `data_dir`, rendered if it was not; an interrupted rendering is begun again.

    Of runs that start at once the first renders, and the others wait for it.
    """
    config = StickMotionConfig(difficulty=difficulty, clips_per_action=clips_per_action, seed=seed)
    # Configurations made from settings are what this builder is for: nothing to warn of.
    logging.getLogger("absl").addFilter(_expected)
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(data_dir) / f"{config.name}.lock"):
        builder = StickMotion(data_dir=str(data_dir), config=config, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    return builder


def _expected(record: logging.LogRecord) -> bool:
    return "Using custom data configuration" not in record.getMessage()
