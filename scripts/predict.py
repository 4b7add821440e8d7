"""Names the action in a video file: plays one episode of a policy with its tools, prints it, and draws it.

  python scripts/predict.py clip.mp4 --labels run,walk,jump --tools.url=http://127.0.0.1:8765
  python scripts/predict.py clip.mp4 --labels bako,zuri --meanings meanings.json --out strip.png

Without --checkpoint the policy is what `make train` wrote. Any setting of scripts/train.py --help may follow.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vstar_jax import huge_pages
from vstar_jax.errors import UserError, run_script

if TYPE_CHECKING:
    from vstar_jax.evaluation.predict import Watched

TRAINED = Path("runs/default")
OUT = Path("runs/predict")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("clip", type=Path, help="a video file")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", help="the actions to choose from, with commas between them")
    labels.add_argument("--labels-file", type=Path, help="the actions to choose from, one a line")
    parser.add_argument("--checkpoint", help="a run directory, or a model directory in Hugging Face format")
    parser.add_argument("--dataset", help="whose settings a model directory gets: stick_motion, hmdb51, ... (configs/)")
    parser.add_argument(
        "--meanings",
        type=Path,
        help='JSON {"0": "label: what it means"} or {label: what it means}, which the explanation tool then tells; for '
        'StickMotion\'s policies as {"bako": "squat then jump = bako"}',
    )
    parser.add_argument("--mesh", default="1x1", help="devices as DATAxMODEL")
    parser.add_argument("--out", type=Path, help=f"the picture; {OUT}/NAME_OF_THE_CLIP.png when not given")
    parser.add_argument("--json", action="store_true", help="print the episode as JSON, and nothing else")
    arguments, settings = parser.parse_known_args()

    out = arguments.out or OUT / f"{arguments.clip.stem}.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"the picture is a PNG file, not {out}: give --out a path that ends in .png.")

    # What is started on the way greets on stdout, which is the report's alone.
    with contextlib.redirect_stdout(sys.stderr):
        watched, checkpoint = _watch(arguments, settings)

    from vstar_jax.evaluation import predict, strip

    strip.save(watched, out)
    if arguments.json:
        print(json.dumps({**watched.summary(), "checkpoint": checkpoint, "strip": str(out)}, indent=2))
    else:
        predict.show(watched, checkpoint)
        print(f"The picture is {out}.")


def _watch(arguments: argparse.Namespace, settings: list[str]) -> tuple["Watched", str]:
    """Plays the episode; also returns the checkpoint that was taken."""
    labels = arguments.labels.split(",") if arguments.labels is not None else _lines(arguments.labels_file)
    meanings = None if arguments.meanings is None else _meanings(arguments.meanings)
    checkpoint = arguments.checkpoint or _trained()

    from vstar_jax import sharding
    from vstar_jax.evaluation import checkpoint as checkpoints
    from vstar_jax.evaluation import predict

    config = checkpoints.config_of(checkpoint, arguments.mesh, settings, arguments.dataset)
    simulated = sharding.simulate_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.announce(mesh, simulated)
    return predict.watch(checkpoint, config, mesh, arguments.clip, labels, OUT / "tools", meanings), checkpoint


def _trained() -> str:
    """The run of `make train`, after GRPO if it came so far; UserError when there is none."""
    for path in (TRAINED / "grpo", TRAINED):
        if (path / "config.yaml").is_file() and any((path / "checkpoints").glob("[0-9]*")):
            return str(path)
    raise UserError(
        f"there is no trained policy in {TRAINED}: train one with make train, or give --checkpoint a run directory or a model "
        "directory."
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"there is no text file {path}: give a file with one label a line.") from None


def _meanings(path: Path) -> dict[str, str]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the server is not a part of the installed package
    from tools_server import glossary
    from tools_server.settings import SettingsError

    try:
        return glossary.read(path)
    except SettingsError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
