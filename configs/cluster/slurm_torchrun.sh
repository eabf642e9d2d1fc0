#!/bin/bash
# Two hosts with 4 GPUs each under Slurm: `sbatch slurm_torchrun.sh JOB.yaml`, with `launcher: torchrun` and
# `tensor_parallel_size: 8` in the job file. When time runs out, submit it again: rows that are done are skipped.
# UNTESTED: no Slurm was at hand; only the shell syntax is checked.
#
#SBATCH --job-name=kvshard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60

set -euo pipefail

job_file=$(realpath "$1")
source /shared/kvshard-env/bin/activate   # has the built wheel, on a disk that all hosts see

head_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a host starts that host's shards; rank 0's host also runs the coordinator and reads and writes the files.
# srun takes no cores from sbatch's options since Slurm 22.05: without its own it would give one to each host.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc-per-node=4 \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$head_host:29500" \
  --rdzv-id="$SLURM_JOB_ID" \
  -m kvshard run "$job_file"
