#!/bin/bash
# A training run on several hosts that outlives its time limit and the loss of a host. From training/:
#   OUTPUT_DIR=/shared/phase1 sbatch ../examples/slurm.sh scripts/train_jepa.py --data-dir /shared/pairs --vit-checkpoint ...
# 120 s before the limit each torchrun gets SIGUSR1 and passes it on; the run saves and leaves, is queued again, and goes
# on from its last save. OUTPUT_DIR must lie on a disk that all hosts share, for the first rank, which writes, may be on
# another one each time. The number of nodes stays, or the batch size with it: --resume says what to give.
#SBATCH --job-name=mamba3-jepa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
: "${OUTPUT_DIR:?where checkpoints go, on a disk that all hosts share}"

saves() { stat -c '%n %Y' "$OUTPUT_DIR"/phase?_last.pt 2>/dev/null; }

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
before=$(saves)
# no --kill-on-bad-exit: it would end rank 0 while that still saves; a run ends by itself where a host is lost
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint "$host:$((20000 + SLURM_JOB_ID % 10000))" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    "$@" --output-dir "$OUTPUT_DIR" --resume
status=$?
# Again only if this time brought it further: what fails at once would fail for ever.
if ((status != 0)) && [[ $(saves) != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
