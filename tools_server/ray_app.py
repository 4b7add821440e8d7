"""The same application under Ray Serve, with replicas that Ray starts and stops as the load asks for (needs `ray[serve]`).

serve run tools_server.ray_app:build replicas=2 gpus=1 settings="--glossary=/data/glossary.json"

Each replica has its own models. A clip is uploaded to whichever replica a call meets; those on one machine share clips and
results through one file, those on another get 404 for a clip that they do not know, and the client uploads it again.
"""

import os
import shlex
from typing import Any

from tools_server import settings
from tools_server.settings import KEY_VARIABLES, TOKEN_VARIABLE


def build(arguments: dict[str, str]) -> Any:
    """The Ray Serve application; replicas, most_replicas; gpus: of each; settings: flags of `python -m tools_server`."""
    from ray import serve

    flags = ["--cache.share_clips=true", *shlex.split(arguments.get("settings", ""))]
    settings.parse(flags)  # a mistake in the flags shows here, not in every replica
    fewest = int(arguments.get("replicas", "1"))
    most = int(arguments.get("most_replicas", fewest))

    @serve.deployment(
        ray_actor_options={"num_gpus": float(arguments.get("gpus", "0"))},
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": 4},
        max_ongoing_requests=64,
    )
    @serve.ingress(lambda: application(flags))
    class Tools:
        """A replica."""

    deployment: Any = Tools
    return deployment.bind()


def application(flags: list[str]) -> Any:
    """The ASGI application of a replica, which reads its secrets from its own environment."""
    from tools_server.app import create

    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    gate, _ = create(settings.parse(flags), os.environ.get(TOKEN_VARIABLE), key)
    return gate
