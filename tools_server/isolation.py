"""Imports ultralytics so that it touches nothing: no network, no installs, no telemetry, no files outside one folder.

Every import of ultralytics in this project goes through `ultralytics`; the switches only work when they are set first.
"""

import atexit
import os
import shutil
import sys
import tempfile
from types import ModuleType

SWITCHES = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "0",
    "YOLO_VERBOSE": "0",
    "ULTRALYTICS_SAFE_LOAD": "1",
}
FOLDERS = ("YOLO_CONFIG_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME")
REPORTERS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb", "vscode_msg")


def ultralytics() -> ModuleType:
    """The module, imported in isolation; a second call only returns it.

    Its settings live in the folder that YOLO_CONFIG_DIR names, else in a temporary one that goes with the process. It would
    also leave OMP_NUM_THREADS=1 and a PIL.Image.open of its own behind; both are put back. RuntimeError when somebody imported
    it unguarded before.
    """
    if "ultralytics" not in sys.modules:
        _import()
    import ultralytics
    from ultralytics import utils

    if utils.ONLINE or utils.AUTOINSTALL or not utils.SAFE_LOAD:
        raise RuntimeError(
            "ultralytics was imported before tools_server could isolate it: import tools_server.isolation first."
        )
    return ultralytics


def _import() -> None:
    os.environ.update(SWITCHES)
    unset = [name for name in FOLDERS if not os.environ.get(name)]
    if unset:
        folder = tempfile.mkdtemp(prefix="tools-server-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update(dict.fromkeys(unset, folder))
    threads = os.environ.get("OMP_NUM_THREADS")
    import torch  # noqa: F401  before ultralytics, which would cut it down to one thread
    from PIL import Image

    opened = Image.open
    from ultralytics import settings

    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    Image.open = opened  # theirs would install and import a plugin for what is no picture
    settings.update(dict.fromkeys(REPORTERS, False))
