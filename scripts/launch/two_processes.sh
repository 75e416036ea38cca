#!/usr/bin/env bash
# Two processes on this machine that are one run, as two hosts would be.
#
# Run, by the test suite too: on Linux with CPU devices (Gloo carries the collectives).
# Not run: with GPUs; give each process its own then, as slurm_gpu.sbatch does.
#
#   scripts/launch/two_processes.sh --steps 20 --output runs/two --mesh data=2
#
# All flags go to both processes. DEVICES CPU devices each, 1 unless it is set.
set -euo pipefail
cd "$(dirname "$0")/../.."

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${DEVICES:-1}"
# A port that nobody listens on.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
for process in 0 1; do
  python scripts/train_tpu.py "$@" \
    --coordinator "127.0.0.1:$port" --num-processes 2 --process-id "$process" &
  pids+=("$!")
done
# The first of them that fails is the status of this script; it lets the others end,
# each of which says why. A signal goes to both: they save, and end.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || status=$?
done
exit "$status"
