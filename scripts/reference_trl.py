"""TRL's GRPOTrainer on a text-only Qwen2 as a rival in benchmarks of the GRPO step.

The trainer runs in a thread of its own, which stands still between steps, so that its steps can be timed in turns with ours.
"""

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from vstar_jax.benchmark.grpo import Taken, reward
from vstar_jax.config import Config
from vstar_jax.errors import UserError
from vstar_jax.models.config import Architecture
from vstar_jax.training.state import ADAM_B2

TRIED_STEPS = 2


class _Turnstile(TrainerCallback):
    """Lets the trainer take one step when `step` is called, on as many threads as `threads` says."""

    def __init__(self, threads: int):
        self.threads = threads
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

    def step(self) -> None:
        """Lets the trainer take one step and waits for its end."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("the trainer failed") from self._error

    def run(self, trainer: GRPOTrainer) -> None:
        """The trainer's thread."""
        try:
            trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._go.acquire()
        torch.set_num_threads(self.threads)  # counts for the thread that calls it

    def on_log(self, *_: Any, **__: Any) -> None:
        """After the step's end: the log of every step is the last that happens in it."""
        self._done.release()


class Trl:
    """A whole step of GRPOTrainer in float32 on the CPU."""

    name = "TRL"
    compile_seconds = 0.0

    def __init__(self, path: Path, prompts: Sequence[str], config: Config):
        if jax.default_backend() != "cpu":
            raise UserError("the comparison with TRL runs on the CPU: set JAX_PLATFORMS=cpu, or leave --against out.")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.prompts, self.config = list(prompts), config
        self.replies: dict[str, list[list[int]]] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.turnstile = _Turnstile(len(os.sched_getaffinity(0)))
        model = Path(self.folder.name) / "model"
        _language_model(path).save_pretrained(model)  # the trainer reads the reference from the policy's directory
        self.trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=self._rewards,
            args=_arguments(config, self.folder.name),
            train_dataset=Dataset.from_dict({"prompt": self.prompts}),
            processing_class=AutoTokenizer.from_pretrained(str(path), local_files_only=True),
            callbacks=[self.turnstile],
        )
        self.trainer.remove_callback(PrinterCallback)
        # A daemon: it waits for its next step for ever when the measurement is over.
        threading.Thread(target=self.turnstile.run, args=(self.trainer,), daemon=True).start()

    def step(self) -> Taken:
        """One step; what it wrote, by prompt."""
        self.turnstile.step()
        written = np.asarray([reply for prompt in self.prompts for reply in self.replies[prompt]])
        norms = [entry["grad_norm"] for entry in self.trainer.state.log_history if "grad_norm" in entry]
        return Taken(written, float(norms[-1]))

    def device_peak(self) -> None:
        """It runs on the CPU."""

    def tune(self) -> None:
        """Products of small models are faster on one thread."""
        self.turnstile.threads = min({1, self.turnstile.threads}, key=self._seconds)

    def _seconds(self, threads: int) -> float:
        self.turnstile.threads = threads
        self.step()
        start = time.perf_counter()
        for _ in range(TRIED_STEPS):
            self.step()
        return time.perf_counter() - start

    def _rewards(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.replies = {prompt: [] for prompt in self.prompts}
        for prompt, reply in zip(prompts, completion_ids, strict=True):
            self.replies[prompt].append(list(reply))
        return [reward(reply) for reply in completion_ids]


def _language_model(path: Path) -> Qwen2ForCausalLM:
    """The text part of a Qwen2.5-VL, which is a Qwen2: on text, M-RoPE is plain RoPE."""
    text = Architecture.from_hf(path).text
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=text.vocab,
            hidden_size=text.hidden,
            intermediate_size=text.intermediate,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            rms_norm_eps=text.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            tie_word_embeddings=text.tie_embeddings,
            dtype=torch.float32,
        )
    )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {name: t.float() for name, t in load_file(file).items() if not name.startswith("visual.")}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise UserError(f"{path} does not hold the weights of a Qwen2: {[*missing, *unexpected][:3]} do not match.")
    model.tie_weights()
    return model


def _arguments(config: Config, folder: str) -> GRPOConfig:
    """The same loss, optimizer and sampling as ours; nothing is saved, and nothing is recomputed in the backward pass."""
    grpo, (tokens,) = config.grpo, config.rollout.max_new_tokens
    return GRPOConfig(
        output_dir=folder,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_steps=grpo.steps,
        per_device_train_batch_size=grpo.prompts * grpo.group,
        gradient_accumulation_steps=1,
        num_generations=grpo.group,
        num_iterations=grpo.updates,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        beta=grpo.beta,
        use_bias_correction_kl=False,
        epsilon=grpo.clip_low,
        epsilon_high=grpo.clip_high,
        loss_type="grpo",
        scale_rewards="group",
        optim="adamw_torch_fused",
        learning_rate=grpo.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=ADAM_B2,
        weight_decay=grpo.weight_decay,
        max_grad_norm=grpo.max_grad_norm,
    )
