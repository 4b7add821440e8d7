"""Hugging Face's Qwen2.5-VL in PyTorch as a rival in benchmarks of the SFT step and of the rollout.

It is set up as well as a user of the library can: flash attention where that is installed and scaled-dot-product attention
elsewhere, no mask since no row is padded, fused AdamW, clipping over all tensors at once, and pixels that are normalised
before the clock starts. In bfloat16 it runs under autocast where parameters are float32.
"""

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from vstar_jax.batch import Example
from vstar_jax.benchmark.common import MIB
from vstar_jax.benchmark.rollout import Workload
from vstar_jax.benchmark.size import Size
from vstar_jax.config import SftConfig
from vstar_jax.data.patches import window_order
from vstar_jax.errors import UserError
from vstar_jax.models.vision import CLIP_MEAN, CLIP_STD

TRIED_TOKENS = 8


class _OnDevice:
    """A model on the device that JAX has, and how much of its memory PyTorch took."""

    name = "Hugging Face"
    compile_seconds = 0.0

    def __init__(self, path: Path, size: Size, dtype: str):
        self.device = device()
        self.dtype, self.compute = getattr(torch, dtype), getattr(torch, size.policy.dtype)
        self.model = load(path, self.dtype).to(self.device)

    def device_peak(self) -> float | None:
        """MiB, see `benchmark.common.device_peak`."""
        return torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else None

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """The model in float32; back in its own type no number has changed."""
        attention = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")  # flash attention has no float32
        self.model.float()
        yield
        self.model.to(self.dtype)
        self.model.set_attn_implementation(attention)


class HuggingFace(_OnDevice):
    """A full SFT step; the dialogues must be of one length, so that nothing is padded."""

    def __init__(self, path: Path, dialogues: Sequence[Example], config: SftConfig, size: Size):
        super().__init__(path, size, size.policy.param_dtype)
        self.model.train()
        if size.policy.remat == "full":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.max_grad_norm = config.max_grad_norm
        parameters = list(self.model.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay),
            dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
        self.inputs = _with_labels(dialogues, size, self.device)
        self.first = _with_labels(dialogues[:1], size, self.device)

    def exact(self) -> tuple[float, float]:
        """The loss and the norm of the gradient of the first dialogue in float32."""
        with self.exactly():
            loss = self.model(**self.first, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def step(self) -> float:
        """One step; the loss before the update."""
        mixed = self.compute != self.dtype
        with torch.autocast(self.device.type, self.compute, enabled=mixed):
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Generation(_OnDevice):
    """`generate` with a cache; every prompt has its clip, and all are of one length."""

    def __init__(self, path: Path, prompts: Sequence[Example], work: Workload, size: Size):
        super().__init__(path, size, size.policy.dtype)
        self.model.eval()
        self.work, self.inputs = work, inputs(prompts, size, self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(min({1, torch.get_num_threads()}, key=self._seconds))

    def sample(self) -> np.ndarray:
        """int64 [prompts * group, tokens], those of a prompt side by side."""
        drawing = dict(do_sample=True, temperature=self.work.temperature, top_p=self.work.top_p, top_k=0)
        return self._generate(self.work.tokens, num_return_sequences=self.work.group, **drawing)

    def greedy(self, tokens: int) -> np.ndarray:
        """int64 [prompts, tokens], in float32."""
        with self.exactly():
            return self._generate(tokens, do_sample=False)

    def _seconds(self, threads: int) -> float:
        """What a few tokens cost with so many threads: products of small models are faster on one."""
        torch.set_num_threads(threads)
        self._generate(1, do_sample=False)
        start = time.perf_counter()
        self._generate(TRIED_TOKENS, do_sample=False)
        return time.perf_counter() - start

    def _generate(self, tokens: int, **options: Any) -> np.ndarray:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        with torch.inference_mode():
            written = self.model.generate(**self.inputs, **length, **options, use_cache=True, pad_token_id=0)
        return written[:, self.inputs["input_ids"].shape[1] :].cpu().numpy()


def device() -> torch.device:
    """Where JAX computes; UserError where PyTorch cannot follow."""
    backend = jax.default_backend()
    if backend == "cpu":
        return torch.device("cpu")
    if backend not in ("gpu", "cuda") or not torch.cuda.is_available():
        raise UserError(f"JAX computes on {backend} and this PyTorch does not: set JAX_PLATFORMS=cpu, or leave --against out.")
    return torch.device("cuda")


def load(path: Path, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a directory, on all threads that this process may use."""
    logging.set_verbosity_error()  # it warns of end tokens that no small vocabulary has
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    flash = dtype != torch.float32 and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation=attention)


def inputs(examples: Sequence[Example], size: Size, device: torch.device) -> dict[str, torch.Tensor]:
    """Explicit positions, since transformers 5 computes other ones than the version that Qwen2.5-VL was released for."""
    order = window_order(size.grid).order
    clips = np.concatenate([e.patches for e in examples]).reshape(-1, len(order), 3, examples[0].patches.shape[1] // 3)
    patches = np.empty_like(clips)
    patches[:, order] = clips  # back from the order of windows
    pixels = (patches.astype(np.float32) / 255.0 - np.reshape(CLIP_MEAN, (3, 1))) / np.reshape(CLIP_STD, (3, 1))
    tensors = dict(
        input_ids=torch.from_numpy(np.stack([e.tokens for e in examples])).long(),
        position_ids=torch.from_numpy(np.stack([e.positions for e in examples])).long().permute(2, 0, 1),
        pixel_values_videos=torch.from_numpy(pixels.reshape(clips.shape[0] * len(order), -1).astype(np.float32)),
        video_grid_thw=torch.tensor([size.grid] * len(clips)),
    )
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _with_labels(dialogues: Sequence[Example], size: Size, device: torch.device) -> dict[str, torch.Tensor]:
    tensors = inputs(dialogues, size, device)
    learned = torch.from_numpy(np.stack([d.loss_mask for d in dialogues])).to(device)
    return {**tensors, "labels": torch.where(learned, tensors["input_ids"], -100)}
