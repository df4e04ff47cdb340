#!/usr/bin/env bash
# Every figure that needs a GPU, in one call of at most nine minutes. Each part runs alone, too, within its own limit,
# and results are written after each contestant.
#   tests   tests/test_gpu.py: learns what a CPU learns, the same bits twice, half precision, few waits
#   steps   steps of a 7B shape: striate, cuDNN's attention, LoRA, the same region by the Trainer, all layers
#   small   steps of SmolLM2-135M's shape: packed rows against padded ones
#   tight   the 7B shape in less memory than it takes: layers are recomputed after a failure, with the same losses
# --dry-run takes a tiny shape and the CPU: it walks the same code in about three minutes, its figures mean nothing.
# Needs torch, transformers, peft, accelerate, pillow (and pytest for the tests).
# usage: bash bench/gpu.sh [--dry-run] [PART ...]    OUT=folder for the JSON files, default bench/results
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} large=7b small=135m device=cuda
if [ "${1:-}" = --dry-run ]; then
  shift
  export STRIATE_TEST_GPU=cpu
  large=tiny small=tiny device=cpu out=${OUT:-$(mktemp -d)}
fi
out=${out:-${OUT:-bench/results}}
mkdir -p "$out"
card=cpu
[ $device = cuda ] && card=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
failed=""

steps() { # SECONDS NAME SHAPE CONTESTANT... [OPTION...]: writes train-NAME-CARD.json
  local limit=$1 name=$2 shape=$3
  shift 3
  timeout "$limit" $python bench/train.py --shape "$shape" --device $device --turns 1 --steps 4 --limit 80 \
    --out "$out/train-$name-$card.json" --only "$@"
}

for part in ${*:-tests steps small tight}; do
  case $part in # 530 seconds in all
    tests) timeout 110 $python -m pytest -q -W default -p no:cacheprovider tests/test_gpu.py ;;
    steps) steps 280 steps "$large" striate striate-cudnn striate-lora region all-recomputed all ;;
    small) steps 70 small "$small" striate striate-padded ;;
    tight) steps 70 tight "$large" striate --less-than "$out/train-steps-$card.json" ;;
    *) echo "no part $part: tests, steps, small, tight" >&2 && exit 2 ;;
  esac || failed="$failed $part"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
