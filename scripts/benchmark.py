"""Measures how fast this project is on this machine, alone or in turns with Hugging Face's implementation in PyTorch."""

import argparse
from pathlib import Path

from vstar_jax.errors import UserError, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default="sft", help="what is measured: sft, the step of supervised fine-tuning")
    parser.add_argument("--against", default=None, help="hf compares with Hugging Face on the CPU, on the same weights")
    parser.add_argument("--model", default="small", help="tiny, small, medium, 3b or 7b, with random weights")
    parser.add_argument("--batch-size", type=int, default=8, help="dialogues of 384 tokens and two clips in a step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each implementation")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder of the result, as JSON and Markdown")
    arguments = parser.parse_args()
    if arguments.what != "sft":
        raise UserError(f"there is no benchmark {arguments.what!r}: sft is the one that exists.")
    if arguments.against not in (None, "hf"):
        raise UserError(f"there is no comparison with {arguments.against!r}: give hf, or leave --against out.")

    from vstar_jax import benchmark

    rival = None
    if arguments.against == "hf":
        import reference_hf

        rival = reference_hf.HuggingFace
    result = benchmark.measure_sft(arguments.model, arguments.batch_size, arguments.repeats, rival)
    print(benchmark.report(result))
    benchmark.write(result, arguments.out)


if __name__ == "__main__":
    run_script(main)
