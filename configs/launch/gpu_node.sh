#!/usr/bin/env bash
# All GPUs of one machine: a single process has them all, so there is nothing to join. Two processes on one machine, for a trial
# on the CPU, are at the end of "More than one process" in README.md.
set -euo pipefail
exec .venv/bin/python scripts/train.py --config=configs/hmdb51.yaml --policy.path="${MODEL:?directory in Hugging Face format}" \
  --policy.dtype=bfloat16 --policy.remat=full --mesh="${MESH:-8x1}" --tools.url="${TOOLS_URL:?address of a tools server}" "$@"
