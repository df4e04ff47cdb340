#!/usr/bin/env bash
# sbatch recipes/launch/slurm.sh recipes/llava-1.5-7b.yaml [--shard ...]
# Five minutes before the time is up Slurm sends SIGTERM: every process finishes its step and saves. The job then puts
# itself in the queue again, and --resume auto goes on from there; once the run is finished it does nothing.
#SBATCH --job-name=striate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 # seconds that torchrun leaves its processes to save; its own 30 are too few

config=$1
shift
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  -m striate tune --config "$config" --resume auto "$@"
status=$?
# Stopped half-way by the signal: once more. Anything else wrong is for somebody to look at.
if [ $status -ne 0 ] && grep -q '"status": "interrupted"' "$(sed -n 's/^out: *//p' "$config")/run.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
