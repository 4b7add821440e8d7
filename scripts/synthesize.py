"""Makes training dialogues for the clips of the training lists with a teacher model, assesses them, and writes the data set.

  export SYNTHESIS_API_KEY=...
  python scripts/synthesize.py --dataset hmdb51 --url https://HOST/v1 --model NAME --judge NAME --out data/synthesis/hmdb51
  python scripts/synthesize.py --dataset stick_motion --url http://127.0.0.1:8766/v1 --model stick-motion-base \\
      --style dialogue --out data/synthesis/stick --limit 20

OUT/kept.jsonl is what data.dialogues takes; OUT/report.md says what was kept, what was dropped, and why. A run that was stopped
goes on with the same command. Any setting of scripts/train.py --help may follow. docs/synthesis.md tells the rest.
"""

import argparse
from pathlib import Path

from vstar_jax.errors import run_script
from vstar_jax.synthesis.endpoint import EndpointSettings


def main() -> None:
    default = EndpointSettings("", "")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", help="stick_motion, hmdb51, ucf101, kinetics400, kinetics600 or ssv2")
    parser.add_argument("--config", help="a file of settings; that of the dataset when not given")
    parser.add_argument("--url", required=True, help="base URL of an endpoint that speaks OpenAI's chat protocol")
    parser.add_argument("--model", required=True, help="the teacher's name there")
    parser.add_argument("--judge", help="name of the judge's model; rules alone when not given")
    parser.add_argument("--judge-url", help="base URL for the judge; --url when not given")
    parser.add_argument("--out", required=True, type=Path, help="folder for everything that is written")
    parser.add_argument("--limit", type=int, default=0, help="only the first clips; 0 takes all")
    parser.add_argument("--style", choices=["json", "dialogue"], default="json", help="what the teacher writes (%(default)s)")
    parser.add_argument("--pictures", choices=["video", "images"], default="video", help="how clips are sent (%(default)s)")
    parser.add_argument("--blind", action="store_true", help="do not tell the teacher the label")
    parser.add_argument("--prompts", default="configs/synthesis/prompts.yaml", help="file of the teacher's texts (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=default.concurrency, help="questions at a time (%(default)s)")
    parser.add_argument("--per-minute", type=float, default=0.0, help="most requests a minute, 0 for no bound (%(default)s)")
    parser.add_argument("--attempts", type=int, default=default.attempts, help="tries of a question (%(default)s)")
    parser.add_argument("--attempt-seconds", type=float, default=default.attempt_seconds, help="of one try (%(default)s)")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of a question with all its tries (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="most tokens of a reply (%(default)s)")
    parser.add_argument("--temperature", type=float, default=default.temperature, help="of the teacher (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="take replies in pieces")
    parser.add_argument(
        "--prices", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens read and written"
    )
    given, settings = parser.parse_known_args()

    from vstar_jax import config as config_module
    from vstar_jax.synthesis.build import Style
    from vstar_jax.synthesis.job import Job, run

    file = given.config or config_module.resolve(f"configs/{given.dataset}.yaml")
    base = config_module.load(Path(file)) if Path(file).is_file() else config_module.Config()
    config = config_module.parse([*settings, *([f"--data.dataset={given.dataset}"] if given.dataset else [])], base)
    names = ("url", "model", "concurrency", "per_minute", "attempts", "attempt_seconds", "seconds", "max_tokens", "temperature")
    shared = {name: getattr(given, name) for name in (*names, "stream")} | {"prices": tuple(given.prices)}
    judge = {**shared, "model": given.judge, "url": given.judge_url or given.url, "temperature": 0.0}
    job = Job(
        out=given.out,
        teacher=EndpointSettings(**shared),
        judge=EndpointSettings(**judge) if given.judge else None,
        style=Style(given.style, given.pictures, not given.blind),
        limit=given.limit,
        prompts=given.prompts,
    )
    summary = run(config, job)
    print(f"{summary['kept']} of {summary['dialogues']} dialogues kept in {given.out / 'kept.jsonl'}")
    print(f"what was dropped, and why: {given.out / 'report.md'}")
    for who, spent in summary["usage"].items():
        print(f"{who}: {spent['prompt_tokens']} tokens read, {spent['written_tokens']} written, cost {spent['cost']:.4f}")
    if summary["failed"]:
        print(f"{len(summary['failed'])} failed and will be tried again by the same command.")


if __name__ == "__main__":
    run_script(main)
