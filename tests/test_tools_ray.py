"""The application under Ray Serve with two replicas; runs where the extra ray is installed, as `-m ray` with nothing beside it.

Ray takes memory and processes in plenty, so the project's own environment does without it.
"""

import importlib.util
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tool_servers import ROOT, clip

from vstar_jax.tools.client import ToolsClient, clip_digest
from vstar_jax.tools.protocol import Request, Tool

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray[serve] is not installed"),
]
SECONDS = 120.0
TOOLS: tuple[Tool, ...] = ("pose_estimation", "person_detection", "video_description")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import ray
    from ray import serve

    from tools_server import ray_app

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("HOME", folder)  # Ray writes a token there
        patch.setenv("PYTHONPATH", f"{ROOT}")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=f"{folder}/ray", log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            flags = f"--mcp=false --cache.path={Path(folder) / 'cache.sqlite'}"
            serve.run(ray_app.build({"replicas": "2", "settings": flags}), route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def test_two_replicas_answer_as_one_and_share_their_clips(url: str) -> None:
    from ray import serve

    (application,) = serve.status().applications.values()
    assert application.deployments["Tools"].replica_states == {"RUNNING": 2}
    client = ToolsClient(url)
    clips = {clip_digest(frames): frames for frames in (clip(number)[0] for number in range(4))}
    asked = [Request(episode=name, turn=0, tools=TOOLS, clip=name) for name in clips]
    first = client.call(asked, clips, SECONDS)
    assert [given.answer.status for given in first] == ["ok"] * len(asked)
    for _ in range(8):  # without the clips: whichever replica is met knows them
        again = client.call(asked, {}, SECONDS)
        assert [given.answer for given in again] == [given.answer for given in first]
    client.close()
