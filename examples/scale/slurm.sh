#!/usr/bin/env bash
#SBATCH --job-name=fastrl
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
# The first nodes train, the last SERVERS nodes sample. Five minutes before the end this script sends SIGTERM to the
# trainers alone; they finish their step, save one checkpoint together and end. Submit the job again to go on.
#   MODEL=/shared/models/qwen3-8b DATA=/shared/data/train.jsonl sbatch examples/scale/slurm.sh [flags of fastrl run]
#   DRY_RUN=1 NODES="n1 n2 n3" MODEL=... DATA=... examples/scale/slurm.sh       # print the commands
set -euo pipefail
: "${MODEL:?a model directory that every node sees}" "${DATA:?a prompt file that every node sees}"

servers=${SERVERS:-1}
gpus=${GPUS_PER_NODE:-8}
port=${PORT:-8000}
key_file=${KEY_FILE:-$HOME/.config/fastrl/vllm.key}
read -r -a nodes <<<"${NODES:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | tr '\n' ' ')}"
trainers=$((${#nodes[@]} - servers))
if ((trainers < 1 || servers < 1)); then
  echo "${#nodes[@]} nodes with SERVERS=$servers leave $trainers to train; ask for more nodes" >&2
  exit 2
fi
# shellcheck source=examples/scale/key.sh
source examples/scale/key.sh

join() { # , A B C -> A,B,C
  local IFS=$1
  shift
  echo "$*"
}
start() { # in the background; $! is its number
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@" &
  fi
}

urls=()
for node in "${nodes[@]:trainers}"; do urls+=("http://$node:$port"); done
first=${nodes[0]}
if [[ -z ${DRY_RUN:-} ]]; then
  make_key "$key_file"
  VLLM_API_KEY=$(<"$key_file") # srun hands the environment on
  export VLLM_API_KEY
fi

# One server per node over all its GPUs, listening on the node's own name. It ends with the job, or with this script.
# The variables are the remote shell's: it knows the node's name.
# shellcheck disable=SC2016
start srun --overlap --nodes="$servers" --ntasks="$servers" --nodelist="$(join , "${nodes[@]:trainers}")" \
  bash -c 'exec python -m fastrl.rollout.server_main "$0" --host "$SLURMD_NODENAME" "${@:1}"' "$MODEL" \
  --port "$port" --dtype bfloat16 --tensor-parallel-size "$gpus" --weight-transfer-config '{"backend": "nccl"}'
server_job=${!:-}

start srun --overlap --nodes="$trainers" --ntasks="$trainers" --nodelist="$(join , "${nodes[@]:0:trainers}")" \
  torchrun --nnodes "$trainers" --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
  --rdzv_id "${SLURM_JOB_ID:-0}" --shutdown-timeout 280 -m fastrl run examples/scale/grpo.yaml \
  --model_name_or_path "$MODEL" --train_dataset "$DATA" --dtype bfloat16 --resume auto \
  --rollout.engine vllm_server --rollout.server.urls "[$(join , "${urls[@]}")]" --rollout.server.transfer nccl \
  --rollout.server.address "$first" --rollout.server.patience_seconds 900 "$@"
[[ -z ${DRY_RUN:-} ]] || exit 0
trainer_job=$!
trap 'kill "$server_job" 2>/dev/null || true' EXIT
trap 'kill -TERM "$trainer_job"' TERM
code=0
wait "$trainer_job" || code=$?
if kill -0 "$trainer_job" 2>/dev/null; then # the signal ended the wait, not the training
  code=0
  wait "$trainer_job" || code=$?
fi
exit "$code"
