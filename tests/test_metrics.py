"""metrics.jsonl, the TensorBoard events and the curves of a run."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from vstar_jax.errors import UserError
from vstar_jax.training.metrics import MetricsWriter, draw_curves, read_metrics


def loss(step: int) -> dict[str, float]:
    return {"sft/loss": 1.0 / step}


def test_every_line_is_json_and_readable_at_once(tmp_path: Path):
    with MetricsWriter(tmp_path / "new") as metrics:
        metrics.write(1, {"sft/loss": np.float32(0.1), "sft/tokens_per_s": jax.numpy.int32(7), "time/step": float("nan")})
        line = json.loads((tmp_path / "new" / "metrics.jsonl").read_text())
    assert line == {"step": 1, "sft/loss": float(np.float32(0.1)), "sft/tokens_per_s": 7.0, "time/step": None}


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path: Path):
    with MetricsWriter(tmp_path / "whole") as metrics:
        for step in range(1, 9):
            metrics.write(step, loss(step))
    with MetricsWriter(tmp_path / "killed") as metrics:
        for step in range(1, 7):
            metrics.write(step, loss(step))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "sft/lo')
    with MetricsWriter(tmp_path / "killed", resume_step=4) as metrics:
        for step in range(5, 9):
            metrics.write(step, loss(step))
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_what_was_measured_at_the_restored_step_is_not_written_twice(tmp_path: Path):
    for _ in range(2):
        with MetricsWriter(tmp_path, resume_step=3) as metrics:
            metrics.write(3, {"eval/base_top1": 0.5})
            metrics.write(3, {"eval/novel_top1": 0.25})
    assert read_metrics(tmp_path) == [{"step": 3, "eval/base_top1": 0.5}, {"step": 3, "eval/novel_top1": 0.25}]


def test_a_fresh_run_replaces_the_lines_of_an_earlier_one(tmp_path: Path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as metrics:
            metrics.write(1, loss(1))
    assert len(read_metrics(tmp_path)) == 1


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.write(1, loss(1))
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_same_scalars(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path) as metrics:
        metrics.write(3, {"sft/loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events, at = path.read_bytes(), [], 0
    while at < len(content):  # a record: length u64, its checksum u32, the event, its checksum u32
        (length,) = struct.unpack_from("<Q", content, at)
        events.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [(3, "sft/loss", 0.5)]


def test_curves_are_drawn_from_the_lines(tmp_path: Path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 30):
            metrics.write(step, loss(step) | {"time/step": 1.0})
        metrics.write(30, {"eval/base_top1": 0.9, "eval/novel_top1": float("nan")})
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_has_no_curves(tmp_path: Path):
    with pytest.raises(UserError, match="has no metrics to draw"):
        draw_curves(tmp_path)
