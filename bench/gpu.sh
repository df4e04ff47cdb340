#!/usr/bin/env bash
# Every figure that needs a GPU, in one call of about nine minutes on an H200. Parts run alone, too, and results are
# written after each contestant.
#   tests   tests/test_gpu.py: learns what a CPU learns, the same bits twice, half precision, few waits
#   turns   steps of a 7B shape: striate, cuDNN's attention, LoRA, the same region by the Trainer, all layers
#   small   steps of SmolLM2-135M's shape: packed rows against padded ones
#   tight   the 7B shape in less memory than it takes: layers are recomputed after a failure, with the same losses
# --dry-run takes a tiny shape and the CPU: it walks the same code, its figures mean nothing.
# Needs torch, transformers, peft, accelerate, pillow (and pytest for the tests).
# usage: bash bench/gpu.sh [--dry-run] [PART ...]    OUT=folder for the JSON files, default bench/results
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} out=${OUT:-bench/results} large=7b small=135m device=cuda
if [ "${1:-}" = --dry-run ]; then
  shift
  large=tiny small=tiny device=cpu out=${OUT:-$(mktemp -d)}
fi
mkdir -p "$out"
card=cpu
[ $device = cuda ] && card=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
failed=""

steps() { # NAME SHAPE CONTESTANT... [-- OPTION...]: writes train-NAME-CARD.json
  local name=$1 shape=$2
  shift 2
  timeout 400 $python bench/train.py --shape "$shape" --device $device --turns 1 --steps 4 --limit 100 \
    --out "$out/train-$name-$card.json" --only "$@"
}

for part in "${@:-all}"; do
  case $part in
    all) OUT=$out PYTHON=$python exec bash bench/gpu.sh $([ $device = cpu ] && echo --dry-run) tests turns small tight ;;
    tests) $python -m pytest -q -W default -p no:cacheprovider tests/test_gpu.py ;;
    turns) steps "$large" "$large" striate striate-cudnn striate-lora region all-recomputed all ;;
    small) steps "$small" "$small" striate striate-padded ;;
    tight) # 85 % of what the first part measured, or 40 GB
      memory=$($python - "$out/train-$large-$card.json" <<'END'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
print(0.85 * json.loads(path.read_text())["contestants"]["striate"]["peak_gb"] if path.exists() else 40)
END
      )
      steps tight "$large" striate --memory "$memory" ;;
    *) echo "no part $part: tests, turns, small, tight" >&2 && exit 2 ;;
  esac || failed="$failed $part"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
