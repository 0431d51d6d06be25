#!/usr/bin/env bash
# The same over plain ssh: TRAINERS and SERVERS are host names, the checkout, MODEL, DATA and the key's file are on a disk
# that all of them see, and `. .venv/bin/activate` works in the checkout.
#   TRAINERS="a b" SERVERS="c" MODEL=/shared/qwen3-8b DATA=/shared/train.jsonl examples/scale/ssh.sh [flags]
# Ctrl-C ends every process at once, without a checkpoint; started again, the run goes on from its newest one.
#   DRY_RUN=1 TRAINERS=... examples/scale/ssh.sh                            # print the commands
set -euo pipefail
: "${TRAINERS:?host names, with spaces between them}" "${SERVERS:?host names}" "${MODEL:?a directory}" "${DATA:?a file}"

read -r -a trainers <<<"$TRAINERS"
read -r -a servers <<<"$SERVERS"
gpus=${GPUS_PER_NODE:-8}
port=${PORT:-8000}
key_file=${KEY_FILE:-$PWD/.fastrl-vllm.key}
# shellcheck source=examples/scale/key.sh
source examples/scale/key.sh
[[ -n ${DRY_RUN:-} ]] || make_key "$key_file"

jobs_started=()
trap 'for job in "${jobs_started[@]:-}"; do kill "$job" 2>/dev/null || true; done' EXIT

on() { # HOST COMMAND...: in the checkout, with the key read from its file over there; ends when this script does
  local host=$1
  shift
  local line
  line="cd $(printf %q "$PWD") && . .venv/bin/activate && VLLM_API_KEY=\$(cat $(printf %q "$key_file")) exec $(printf '%q ' "$@")"
  if [[ -n ${DRY_RUN:-} ]]; then
    echo "ssh -tt $host $line"
  else
    ssh -tt -o BatchMode=yes "$host" "$line" </dev/null & # -tt: a closed connection ends the command over there
    jobs_started+=($!)
  fi
}

urls=()
for host in "${servers[@]}"; do
  urls+=("http://$host:$port")
  on "$host" python -m fastrl.rollout.server_main "$MODEL" --host "$host" --port "$port" --dtype bfloat16 \
    --tensor-parallel-size "$gpus" --weight-transfer-config '{"backend": "nccl"}'
done
first_trainer=${#jobs_started[@]}
list=$(IFS=, && echo "${urls[*]}")
for place in "${!trainers[@]}"; do
  on "${trainers[$place]}" torchrun --nnodes "${#trainers[@]}" --node_rank "$place" --nproc_per_node "$gpus" \
    --master_addr "${trainers[0]}" --master_port 29500 --shutdown-timeout 280 -m fastrl run examples/scale/grpo.yaml \
    --model_name_or_path "$MODEL" --train_dataset "$DATA" --dtype bfloat16 --resume auto \
    --rollout.engine vllm_server --rollout.server.urls "[$list]" --rollout.server.transfer nccl \
    --rollout.server.address "${trainers[0]}" --rollout.server.patience_seconds 900 "$@"
done
code=0
for job in "${jobs_started[@]:first_trainer}"; do wait "$job" || code=$?; done
exit "$code"
