#!/bin/sh
# The paper's two stages in order, for one of its four models:
#
#     sh recipes/paper.sh llava-1.5-7b          # on one GPU
#     GPUS=8 sh recipes/paper.sh llava-1.5-7b   # on eight
#
# Stage 1 (align) trains the projector on captions, images as the tower takes them, the template without words; stage 2
# (tune) trains the visual region, images padded to a square, in the model's own wording. The learned projector goes from
# one to the other as mm_projector.bin. With a published one (liuhaotian/llava-v1.5-mlp2x-336px-pretrain-*,
# BoyaWu10/bunny-pretrain-*) put `--import` of it in the place of everything up to `start`.
set -eu

NAME=${1:?llava-1.5-7b, llava-1.5-13b, bunny-llama-3-8b or bunny-phi3-mini-4b}
GPUS=${GPUS:-1}
RUNS=runs/$NAME

CLIP=openai/clip-vit-large-patch14-336
SIGLIP=google/siglip-so400m-patch14-384
case $NAME in  # language model, tower, wording, stage-1 data
llava-1.5-7b) set -- lmsys/vicuna-7b-v1.5 $CLIP vicuna_v1 data/blip_laion_cc_sbu_558k.json ;;
llava-1.5-13b) set -- lmsys/vicuna-13b-v1.5 $CLIP vicuna_v1 data/blip_laion_cc_sbu_558k.json ;;
bunny-llama-3-8b) set -- meta-llama/Meta-Llama-3-8B-Instruct $SIGLIP bunny_llama3 data/bunny_pretrain_laion_2m.json ;;
bunny-phi3-mini-4b) set -- microsoft/Phi-3-mini-4k-instruct $SIGLIP bunny_phi3 data/bunny_pretrain_laion_2m.json ;;
*) echo "no recipe for $NAME" >&2; exit 2 ;;
esac
LLM=$1 VISION=$2 TEMPLATE=$3 CAPTIONS=$4

train() { if [ "$GPUS" = 1 ]; then striate "$@"; else torchrun --nproc-per-node "$GPUS" -m striate "$@"; fi; }

striate assemble --llm $LLM --vision $VISION --template plain --aspect square --out $RUNS/blind
train align --model $RUNS/blind --data $CAPTIONS --images data/pretrain --out $RUNS/aligned --epochs 1 --batch 256 --micro-batch 8 --learning-rate 1e-3 --max-length 2048 --checkpointing all --workers 4 --seed 42
striate assemble --export-projector $RUNS/aligned --out $RUNS/projector
striate assemble --llm $LLM --vision $VISION --template $TEMPLATE --aspect pad --projector $RUNS/projector/checkpoint/mm_projector.bin --out $RUNS/start
train tune --config recipes/$NAME.yaml
