"""ultralytics' own predictor in this process, as the rival of the tools server in benchmarks."""

from pathlib import Path

import numpy as np

from tools_server import isolation
from tools_server.yolo import MOST_PEOPLE, OVERLAP
from vstar_jax.tools.protocol import People, Person

CONFIDENCE = 0.25
BATCH = 16
"""Frames of a call, as the server's own."""


class InProcess:
    """A pose model with the server's settings; the image size is what the weights were trained with."""

    name = "ultralytics in process"

    def __init__(self, weights: Path):
        self.model = isolation.ultralytics().YOLO(str(weights))

    def find(self, frames: np.ndarray) -> People:
        """The people in frames uint8 [T, H, W, 3] in RGB, the surest first."""
        reversed_channels = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]  # its predictor takes BGR
        people = []
        for start in range(0, len(frames), BATCH):
            results = self.model.predict(
                reversed_channels[start : start + BATCH],
                conf=CONFIDENCE,
                iou=OVERLAP,
                classes=[0],
                max_det=MOST_PEOPLE,
                verbose=False,
            )
            people += [
                tuple(
                    Person(box=box, confidence=confidence, keypoints=keypoints)
                    for box, confidence, keypoints in zip(
                        r.boxes.xyxy.tolist(), r.boxes.conf.tolist(), r.keypoints.data.tolist(), strict=True
                    )
                )
                for r in results
            ]
        return tuple(people)
