"""Hugging Face's Qwen2.5-VL in PyTorch as a rival in benchmarks: the only file beside the tests that imports torch.

It is set up as well as a user of the library can: scaled-dot-product attention, no mask since no row is padded, fused AdamW,
clipping over all tensors at once, and pixels that are normalised before the clock starts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from vstar_jax.batch import Example
from vstar_jax.benchmark import GRID
from vstar_jax.config import SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models.vision import CLIP_MEAN, CLIP_STD


class HuggingFace:
    """A full SFT step in float32 on the CPU; the dialogues must be of one length, so that nothing is padded."""

    name = "Hugging Face"
    compile_seconds = 0.0

    def __init__(self, path: Path, dialogues: Sequence[Example], config: SftConfig):
        if jax.default_backend() != "cpu":
            raise UserError("the comparison with Hugging Face runs on the CPU: set JAX_PLATFORMS=cpu, or leave --against out.")
        logging.set_verbosity_error()  # it warns of end tokens that no small vocabulary has
        logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.max_grad_norm = config.max_grad_norm
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.model.train()
        parameters = list(self.model.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay),
            dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
        self.inputs = self._inputs(dialogues)

    def step(self) -> float:
        """One step; the loss before the update."""
        loss = self.model(**self.inputs, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        self.optimizer.step()
        return loss.item()

    @staticmethod
    def _inputs(dialogues: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Explicit positions, since transformers 5 computes other ones than the version that Qwen2.5-VL was released for."""
        tokens = torch.from_numpy(np.stack([d.tokens for d in dialogues])).long()
        learned = torch.from_numpy(np.stack([d.loss_mask for d in dialogues]))
        patches = np.concatenate([d.patches for d in dialogues]).reshape(-1, 3, dialogues[0].patches.shape[1] // 3)
        pixels = (patches / 255.0 - np.reshape(CLIP_MEAN, (3, 1))) / np.reshape(CLIP_STD, (3, 1))
        clips = len(patches) // int(np.prod(GRID))
        return dict(
            input_ids=tokens,
            labels=torch.where(learned, tokens, -100),
            position_ids=torch.from_numpy(np.stack([d.positions for d in dialogues])).long().permute(2, 0, 1),
            pixel_values_videos=torch.from_numpy(pixels.reshape(len(patches), -1).astype(np.float32)),
            video_grid_thw=torch.tensor([GRID] * clips),
        )
