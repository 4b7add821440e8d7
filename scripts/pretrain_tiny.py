"""Makes StickMotion's base model from nothing: the miniature's counterpart of Qwen2.5-VL-Instruct.

It learns to repeat words, to look up freshly named actions in text and to name moves on clean clips, in other words than the
dialogues of SFT and on other combinations of moves than StickMotion's actions. Interrupt it and start it again as you like.
"""

import argparse
from pathlib import Path

from vstar_jax import huge_pages
from vstar_jax.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="vstar_jax/assets/stick-motion-base", help="model directory to write")
    parser.add_argument("--work", default="runs/pretrain", help="run directory: clips, checkpoints, metrics")
    parser.add_argument("--reading", type=int, default=1000, help="optimizer steps on text alone")
    parser.add_argument("--watching", type=int, default=500, help="optimizer steps on clips and text")
    parser.add_argument("--clips", type=int, default=6000, help="clips drawn before training")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    arguments = parser.parse_args()

    from vstar_jax.training.pretrain import pretrain

    pretrain(Path(arguments.out), Path(arguments.work), arguments.reading, arguments.watching, arguments.clips, arguments.seed)


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
