"""Hugging Face's Qwen2.5-VL in PyTorch as a rival in benchmarks of the SFT step and of the rollout.

It is set up as well as a user of the library can: scaled-dot-product attention, no mask since no row is padded, fused AdamW,
clipping over all tensors at once, and pixels that are normalised before the clock starts.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from vstar_jax.batch import Example
from vstar_jax.benchmark.rollout import Workload
from vstar_jax.benchmark.sft import GRID
from vstar_jax.config import SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models.vision import CLIP_MEAN, CLIP_STD

TRIED_TOKENS = 8


class HuggingFace:
    """A full SFT step in float32 on the CPU; the dialogues must be of one length, so that nothing is padded."""

    name = "Hugging Face"
    compile_seconds = 0.0

    def __init__(self, path: Path, dialogues: Sequence[Example], config: SftConfig):
        self.model = load(path).train()
        self.max_grad_norm = config.max_grad_norm
        parameters = list(self.model.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay),
            dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
        learned = torch.from_numpy(np.stack([d.loss_mask for d in dialogues]))
        self.inputs = inputs(dialogues)
        self.inputs["labels"] = torch.where(learned, self.inputs["input_ids"], -100)

    def step(self) -> float:
        """One step; the loss before the update."""
        loss = self.model(**self.inputs, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        self.optimizer.step()
        return loss.item()


class Generation:
    """`generate` with a cache on the CPU in float32; every prompt has its clip, and all are of one length."""

    name = "Hugging Face"
    compile_seconds = 0.0

    def __init__(self, path: Path, prompts: Sequence[Example], work: Workload):
        self.model, self.work = load(path).eval(), work
        self.inputs = inputs(prompts)
        torch.set_num_threads(min({1, torch.get_num_threads()}, key=self._seconds))

    def sample(self) -> np.ndarray:
        """int64 [prompts * group, tokens], those of a prompt side by side."""
        drawing = dict(do_sample=True, temperature=self.work.temperature, top_p=self.work.top_p, top_k=0)
        return self._generate(self.work.tokens, num_return_sequences=self.work.group, **drawing)

    def greedy(self, tokens: int) -> np.ndarray:
        """int64 [prompts, tokens]."""
        return self._generate(tokens, do_sample=False)

    def _seconds(self, threads: int) -> float:
        """What a few tokens cost with so many threads: products of small models are faster on one."""
        torch.set_num_threads(threads)
        self.greedy(1)
        start = time.perf_counter()
        self.greedy(TRIED_TOKENS)
        return time.perf_counter() - start

    def _generate(self, tokens: int, **options: Any) -> np.ndarray:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        with torch.inference_mode():
            written = self.model.generate(**self.inputs, **length, **options, use_cache=True, pad_token_id=0)
        return written[:, self.inputs["input_ids"].shape[1] :].numpy()


def load(path: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a directory in float32, on all threads that this process may use."""
    if jax.default_backend() != "cpu":
        raise UserError("the comparison with Hugging Face runs on the CPU: set JAX_PLATFORMS=cpu, or leave --against out.")
    logging.set_verbosity_error()  # it warns of end tokens that no small vocabulary has
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Explicit positions, since transformers 5 computes other ones than the version that Qwen2.5-VL was released for."""
    patches = np.concatenate([e.patches for e in examples]).reshape(-1, 3, examples[0].patches.shape[1] // 3)
    pixels = (patches / 255.0 - np.reshape(CLIP_MEAN, (3, 1))) / np.reshape(CLIP_STD, (3, 1))
    clips = len(patches) // int(np.prod(GRID))
    return dict(
        input_ids=torch.from_numpy(np.stack([e.tokens for e in examples])).long(),
        position_ids=torch.from_numpy(np.stack([e.positions for e in examples])).long().permute(2, 0, 1),
        pixel_values_videos=torch.from_numpy(pixels.reshape(len(patches), -1).astype(np.float32)),
        video_grid_thw=torch.tensor([GRID] * clips),
    )
