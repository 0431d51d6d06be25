#!/usr/bin/env bash
# One machine: as many trainer processes as it has GPUs, or RANKS of them.
#   examples/scale/run.sh [flags of fastrl run]
#   RANKS=2 examples/scale/run.sh --device cpu
#   DRY_RUN=1 examples/scale/run.sh        # print the command
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
command=(torchrun --standalone --nproc_per_node "$ranks" --shutdown-timeout 280
  -m fastrl run examples/scale/grpo.yaml "$@")

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
