#!/usr/bin/env bash
# One host and all of its GPUs, which one process drives.
#   launch/gpus.sh --config=configs/mamba_lm.py:370m --config.mesh.data=2 --config.mesh.fsdp=4
# JAX=cuda12 for an older driver.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
  .venv/bin/pip install --quiet --editable . "jax[${JAX:-cuda13}]"
fi
exec .venv/bin/python run.py "$@"
