#!/usr/bin/env bash
# A Cloud TPU slice of several hosts: one process a host, which JAX finds by itself. NAME and ZONE are the slice's; the checkout,
# its .venv (with jax[tpu]) and MODEL stand at the same place on every host, BUCKET is a mounted one that all of them see.
# This has not been run: see "More than one process" in README.md.
set -euo pipefail
: "${NAME:?the slice}" "${ZONE:?its zone}" "${MODEL:?directory in Hugging Face format}" "${BUCKET:?folder that all hosts see}"
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="cd vstar_jax && .venv/bin/python scripts/train.py \
  --config=configs/hmdb51.yaml --policy.path=$MODEL --policy.dtype=bfloat16 --policy.remat=full \
  --mesh=${MESH:-16x1} --data.dir=$BUCKET/data --run_dir=$BUCKET/runs/hmdb51 --tools.url=${TOOLS_URL:?address of a tools server} \
  --distributed.coordinator=auto"
