#!/bin/bash
# One Ray cluster for one job, on the nodes that SLURM gives: sbatch slurm.sh /shared/search.toml
# After a time limit or a failure: sbatch slurm.sh /shared/search.toml --resume
#SBATCH --job-name=hwnas
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=12:00:00
set -euo pipefail

# Every node reads the token from the home folder that they share.
export RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
# Starts Ray on every node, runs the command on the head when all have joined, then stops them.
srun --kill-on-bad-exit=1 ray symmetric-run \
    --address "$head:6379" \
    --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" \
    -- nas cluster "$@" --ray auto
