#!/usr/bin/env bash
# Every figure that needs a GPU, in one call of under ten minutes: the GPU tests, then training steps of a 7B shape.
# Takes the torch, transformers and peft that are installed. usage: bash bench/gpu.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
card=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
$python -m pytest -m gpu tests
timeout 560 $python bench/train.py --shape 7b --device cuda --turns 2 --steps 4 \
    --only all all-recomputed region striate striate-lora --out "$out/train-$card.json"
