#!/bin/bash
# `sbatch multihost-slurm.sh`: one process on each node, with all of its GPUs. It has not been run yet.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=B:TERM@60

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST
srun --kill-on-bad-exit=1 bash -c 'exec gptjax serve -m /shared/gpt-oss-120b --mesh tensor=2,expert=8 \
    --host 0.0.0.0 --coordinator "$FIRST:1234" --num-processes "$SLURM_NTASKS" --process-id "$SLURM_PROCID"' &
# Slurm signals this script; process 0 then drains, and the others wait for it.
trap 'kill -TERM %1' TERM
wait %1 || wait %1  # the first returns when the signal comes
