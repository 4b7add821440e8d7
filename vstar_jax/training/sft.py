"""The SFT run: batches in, checkpoints and metrics out, interruptible and resumable at any step."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax.batch import Batch
from vstar_jax.config import Config
from vstar_jax.distributed import first
from vstar_jax.errors import Interrupted, UserError
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.sharding import put_batch
from vstar_jax.training.checkpoint import Checkpointer
from vstar_jax.training.interrupts import asked_to_stop, stop_requests
from vstar_jax.training.metrics import MetricsWriter
from vstar_jax.training.profile import Profile
from vstar_jax.training.state import TrainState, create_state, make_optimizer, make_train_step


@dataclass(frozen=True)
class SftRun:
    """A finished run: the graph definition, the trained state and how many times the step was compiled."""

    graphdef: Any
    state: TrainState
    compilations: int


def train(model: Qwen25VL, batches: Any, config: Config, mesh: Mesh, run_dir: Path) -> SftRun:
    """Trains for `config.sft.steps` steps, going on from the last checkpoint under `run_dir` if there is one.

    batches: an iterator of this process's rows of host batches, with get_state and set_state (`data.pipeline`). Raises
    Interrupted after saving when the process is asked to stop, and UserError when the loss is no longer a number or the disk is
    full.
    """
    sft = config.sft
    optimizer = make_optimizer(sft, config.policy.moment_dtype)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, config.policy.lora, mesh, config.seed)
        step_fn = make_train_step(graphdef, optimizer, sft, config.data.pack, state)
        checkpointer = Checkpointer(run_dir / "checkpoints", sft.keep)
        if checkpointer.latest() is not None:
            state, data_state = checkpointer.restore(state)
            batches.set_state(data_state)
        done = int(state.step)
        metrics = MetricsWriter(run_dir, resume_step=done)
        bar = tqdm(total=sft.steps, initial=done, desc="SFT", unit="step", disable=not first())
        profile = Profile(config.profile, run_dir / "profile" / "sft", done)
        with stop_requests() as stops, bar, metrics, profile:
            for step in range(done + 1, sft.steps + 1):
                profile.reached(step)
                started = time.perf_counter()
                batch: Batch = next(batches)
                waited = time.perf_counter() - started
                state, device_metrics = step_fn(state, put_batch(batch, mesh))
                values = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
                seconds = time.perf_counter() - started
                tokens = (batch.segments > 0).sum() * jax.process_count()  # the others' rows hold about as many
                values["sft/tokens_per_s"] = float(tokens) / seconds
                values["time/step"], values["time/data"] = seconds, waited
                metrics.write(step, values)
                bar.set_postfix_str(f"loss {values['sft/loss']:.4f}, {values['sft/tokens_per_s']:.0f} tokens/s")
                bar.update()
                if values["sft/loss"] != values["sft/loss"]:
                    raise UserError(
                        f"the loss is not a number at step {step}: lower sft.learning_rate or sft.max_grad_norm and start "
                        f"again from the checkpoint of step {checkpointer.latest() or 0}."
                    )
                stopped = asked_to_stop(stops)
                if step % sft.save_every == 0 or step == sft.steps or stopped:
                    checkpointer.save(state, batches.get_state())
                if stopped:
                    checkpointer.close()
                    raise Interrupted(step, stopped)
        checkpointer.close()
    compilations = step_fn._cache_size()  # type: ignore[attr-defined]
    return SftRun(graphdef, state, compilations)
