"""Serves the policy of a run or of a model directory behind OpenAI's chat protocol, for any client of it.

  python scripts/serve.py --checkpoint runs/default
  python scripts/serve.py --checkpoint MODEL_DIR --port 8766 --rows 8 --data.tokens=[512,2048,4096]

Then: openai.OpenAI(base_url="http://127.0.0.1:8766/v1", api_key="none"). Clips are data URLs in `video_url` parts, or lists of
image data URLs in `video` parts. Another address than this machine's own needs a token in the environment variable SERVE_TOKEN.
Any setting of scripts/train.py --help may follow.
"""

import argparse

from vstar_jax import huge_pages
from vstar_jax.errors import run_script
from vstar_jax.serving.server import Address, Batching, serve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="a run directory, or a model directory in Hugging Face format")
    parser.add_argument("--host", default=Address.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=Address.port, help="port to listen on, 0 for a free one (%(default)s)")
    parser.add_argument(
        "--drain", type=float, default=Address.drain, help="seconds to finish replies in at the end (%(default)s)"
    )
    parser.add_argument("--rows", type=_positive, default=Batching.rows, help="requests that decode together (%(default)s)")
    parser.add_argument("--chunk", type=_positive, default=Batching.chunk, help="tokens decoded at a time (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=_positive, default=Batching.new_tokens, help="most tokens of a reply (%(default)s)"
    )
    parser.add_argument("--queue", type=_positive, default=Batching.queue, help="requests that may wait (%(default)s)")
    parser.add_argument("--mesh", help="devices as 1xMODEL; the run's own when not given")
    given, settings = parser.parse_known_args()
    address = Address(given.host, given.port, given.drain)
    serve(given.checkpoint, settings, given.mesh, address, Batching(given.rows, given.chunk, given.new_tokens, given.queue))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
