#!/bin/sh
# A reasoning-gym task from nothing: data, a model with random weights, SFT, GRPO with the task's verifier.
# Run it from the repository root, with the environment that has fastrl and reasoning-gym first on PATH.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads that wait for each other on a busy machine are slower
here=examples/reasoning_gym
if [ -e runs/reasoning_gym ]; then
    echo "runs/reasoning_gym is there from an earlier run; remove it first" >&2
    exit 1
fi

python $here/prepare.py
python examples/tiny_model.py runs/reasoning_gym/train.jsonl runs/reasoning_gym/base \
    --vocab_size 512 --hidden_size 64 --layers 2

fastrl run $here/sft.yaml
fastrl run $here/eval.yaml
fastrl run $here/grpo.yaml
fastrl run $here/eval.yaml --model_name_or_path runs/reasoning_gym/grpo/model
