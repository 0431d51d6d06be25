#!/bin/sh
# The whole example: data, a model with random weights, SFT, GRPO, and a table of what each brought.
# Run it from the repository root, with the environment that has fastrl first on PATH.
#     examples/gsm8k/run.sh [FOLDER WITH GSM8K's train.jsonl]
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads that wait for each other on a busy machine are slower
here=examples/gsm8k
started=$(date +%s)
if [ -e runs/gsm8k ]; then
    echo "runs/gsm8k is there from an earlier run; remove it first" >&2
    exit 1
fi

python $here/prepare.py ${1:+--data "$1"}
python examples/tiny_model.py runs/gsm8k/train.jsonl runs/gsm8k/base

fastrl run $here/sft.yaml
fastrl run $here/eval.yaml --output_dir runs/gsm8k/eval-sft
fastrl run $here/grpo.yaml
fastrl run $here/eval.yaml --model_name_or_path runs/gsm8k/grpo/model --output_dir runs/gsm8k/eval-grpo

python $here/summary.py
echo "$(($(date +%s) - started)) seconds; processor time (user, system) of this shell and of the commands:"
times
