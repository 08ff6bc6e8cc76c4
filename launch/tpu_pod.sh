#!/usr/bin/env bash
# A TPU pod slice, by gcloud: makes it, copies this commit there, runs, takes it down.
#   BUCKET=my-bucket TYPE=v5litepod-16 launch/tpu_pod.sh --config=configs/mamba_lm.py:370m
# The run's directory lies in the bucket: the same command goes on where a slice was taken away.
# NAME, TYPE, ZONE and VERSION may be set; gcloud knows the project.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${BUCKET:?name a bucket of Google Cloud Storage, for the run}"
name=${NAME:-recurrax} zone=${ZONE:-us-west4-a}

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
everywhere() { tpu ssh "$name" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar.gz)
git archive --output="$archive" HEAD
tpu create "$name" --accelerator-type="${TYPE:-v5litepod-16}" \
  --version="${VERSION:-v2-alpha-tpuv5-lite}"
trap 'rm -f "$archive"; tpu delete "$name" --quiet' EXIT
tpu scp "$archive" "$name:recurrax.tar.gz" --worker=all
# The image's Python is too old: uv brings one. gcsfuse makes the bucket a directory.
everywhere '
  set -e
  mkdir -p recurrax/runs && tar xzf recurrax.tar.gz -C recurrax
  curl -LsSf https://astral.sh/uv/install.sh | sh
  cd recurrax && ~/.local/bin/uv venv --quiet --python 3.12 .venv
  ~/.local/bin/uv pip install --quiet --editable ".[tpu]"
  source=https://packages.cloud.google.com/apt
  curl -fsS $source/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq gcsfuse
  ~/recurrax/.venv/bin/python -c "import jax; print(jax.__version__)"'
everywhere "cd recurrax && gcsfuse --implicit-dirs $BUCKET runs && .venv/bin/python run.py$(printf ' %q' "$@")"
