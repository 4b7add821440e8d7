"""A torch DataLoader with Hugging Face's processor of Qwen2.5-VL as a rival in the benchmark of the input pipeline.

It is set up as a user of both would: clips are decoded where a dataset's items are made and the processor makes whole batches
of them in `collate_fn`, so that both run in the worker processes; the workers persist, with one thread each as torch sets them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from vstar_jax.benchmark.data import Prepared, Workload
from vstar_jax.config import Config, VideoConfig, resolve
from vstar_jax.data import video
from vstar_jax.data.chat import Message
from vstar_jax.models.vision import CLIP_MEAN, CLIP_STD

Item = tuple[torch.Tensor, float]
"""Frames uint8 [T, 3, H, W] and how many of them there are in a second."""


class Clips(Dataset[Item]):
    """Sampled frames of files, by the project's own reader, so that decoder and frames are the same."""

    def __init__(self, paths: Sequence[Path], frames: int, length: int):
        self.paths, self.frames, self.length = paths, frames, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Item:
        clip = video.read(self.paths[number % len(self.paths)], self.frames)
        return torch.from_numpy(clip.frames).permute(0, 3, 1, 2), clip.fps


class Collate:
    """Items to a batch: the processor with the tokenizer and chat template of a model directory."""

    def __init__(self, path: Path, messages: Sequence[Message], limits: VideoConfig):
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        bounds = dict(min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
        videos = Qwen2VLVideoProcessor(**bounds, cap_pixels_per_frame=False)
        self.processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**bounds), tokenizer, videos, chat_template=tokenizer.chat_template
        )
        self.messages = [dict(message) for message in messages]

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        text = self.processor.apply_chat_template(self.messages, tokenize=False)
        frames = [clip for clip, _ in items]
        metadata = [
            VideoMetadata(total_num_frames=len(clip), fps=fps, frames_indices=list(range(len(clip)))) for clip, fps in items
        ]
        return dict(
            self.processor(
                text=[text] * len(items),
                videos=frames,
                video_metadata=metadata,
                do_sample_frames=False,
                padding=True,
                return_tensors="pt",
            )
        )


class Torch:
    """See `benchmark.data.Pipeline`."""

    name = "torch DataLoader"

    def __init__(self, paths: Sequence[Path], messages: Sequence[Message], config: Config, work: Workload):
        self.items = Clips(paths, config.video.frames, work.clips)
        self.collate = Collate(resolve(config.policy.path), messages, config.video)
        self.loader = DataLoader(
            self.items,
            batch_size=work.batch,
            shuffle=True,
            collate_fn=self.collate,
            num_workers=work.workers,
            multiprocessing_context="spawn",  # a fork of a process with threads of JAX can hang
            persistent_workers=True,
        )

    def run(self) -> int:
        """See `benchmark.data.Pipeline`."""
        return sum(len(batch["input_ids"]) for batch in self.loader)

    def prepared(self, number: int) -> Prepared:
        """See `benchmark.data.Pipeline`; what was normalised is brought back to grey levels."""
        made: dict[str, Any] = self.collate([self.items[number]])
        rows = made["pixel_values_videos"].numpy().reshape(-1, 3, made["pixel_values_videos"].shape[1] // 3)
        levels = 255 * (rows * np.reshape(CLIP_STD, (3, 1)) + np.reshape(CLIP_MEAN, (3, 1)))
        grid = tuple(made["video_grid_thw"][0].tolist())
        return Prepared(made["input_ids"][0].numpy(), levels.reshape(len(rows), -1), grid)

    def close(self) -> None:
        """Ends the workers."""
        del self.loader
