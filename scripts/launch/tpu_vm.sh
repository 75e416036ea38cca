#!/usr/bin/env bash
# A run on all hosts of a TPU VM slice, started from your own machine with gcloud.
#
# Run: only the syntax check, and that the script takes these flags (the test suite).
# Not run: everything else. There was no TPU and no Google Cloud project to run it in.
#
#   NAME=my-slice ZONE=us-west4-a ACCELERATOR=v5litepod-16 scripts/launch/tpu_vm.sh create
#   NAME=my-slice ZONE=us-west4-a scripts/launch/tpu_vm.sh install
#   NAME=my-slice ZONE=us-west4-a scripts/launch/tpu_vm.sh train --output /mnt/shared/run ...
#   NAME=my-slice ZONE=us-west4-a scripts/launch/tpu_vm.sh delete
#
# Say first what fits, on any machine: python scripts/train_tpu.py --plan v5e:4x4 ...
#
# The output folder, and models and data given as paths, have to be the same on every
# host: a Filestore share, or a bucket mounted by Cloud Storage FUSE. After a preemption
# the same `train` command with --resume goes on.
set -euo pipefail

: "${NAME:?the name of the slice}" "${ZONE:?its zone, such as us-west4-a}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
FOLDER="${FOLDER:-taid-jax}"              # of the project in every host's home

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

action="${1:?create, install, train or delete}"
shift
case "$action" in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" \
      --accelerator-type "${ACCELERATOR:?such as v5litepod-16}" --version "$RUNTIME"
    ;;
  install)
    # Without what is large or made here.
    archive=$(mktemp --suffix .tar.gz)
    git -C "$(dirname "$0")/../.." archive --format tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:project.tar.gz" \
      --zone "$ZONE" --worker=all
    rm "$archive"
    on_all_hosts "mkdir -p $FOLDER && tar -xzf project.tar.gz -C $FOLDER &&
      python3 -m venv $FOLDER/.venv && $FOLDER/.venv/bin/pip install -e '$FOLDER[tpu]'"
    ;;
  train)
    # Every host runs the same command; JAX finds the others from the slice's metadata.
    flags=$(printf '%q ' "$@")
    on_all_hosts "cd $FOLDER && .venv/bin/python scripts/train_tpu.py --cluster gcetpu $flags"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE"
    ;;
  *)
    echo "need create, install, train or delete, got $action" >&2
    exit 2
    ;;
esac
