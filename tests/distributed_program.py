"""A whole run in a small world, by one process or by several: distributed_program.py CONFIG.yaml [--distributed.process=N ...].

SFT, GRPO with callbacks and an evaluation, with what `training.job` would do around them.
"""

import sys
from pathlib import Path

import jax
from flax import nnx
from grpo_program import FewClips

from vstar_jax import distributed
from vstar_jax.config import parse
from vstar_jax.data.chat import Chat
from vstar_jax.data.pipeline import train_batches
from vstar_jax.errors import run_script
from vstar_jax.evaluation.protocol import evaluate
from vstar_jax.evaluation.report import write_predictions
from vstar_jax.sharding import make_mesh, simulate_devices
from vstar_jax.tools.host import annotations
from vstar_jax.training.grpo import train_grpo
from vstar_jax.training.job import load_policy
from vstar_jax.training.sft import train


def main() -> None:
    config = parse([f"--config={sys.argv[1]}", *sys.argv[2:]])
    simulate_devices(config.mesh, config.distributed.processes)
    distributed.start(config.distributed)
    mesh, run_dir = make_mesh(config.mesh), Path(config.run_dir)
    chat = Chat(config.policy.path, config.video)
    task = FewClips(config, chat)
    own = {"process_index": jax.process_index(), "process_count": jax.process_count(), "agree": distributed.largest}
    batches = train_batches(task.train_records(), task.example, config, **own)
    learned = train(load_policy(config, mesh), batches, config, mesh, run_dir)
    model = nnx.merge(learned.graphdef, learned.state.params, learned.state.frozen)
    done = train_grpo(model, task, chat, annotations, config, mesh, run_dir)
    state = nnx.merge_state(done.state.params, done.state.frozen)
    predictions = evaluate(done.graphdef, state, task, chat, annotations, config, mesh, "policy")
    if distributed.first():
        write_predictions(run_dir / "predictions.jsonl", predictions)


if __name__ == "__main__":
    run_script(main)
