#!/usr/bin/env bash
# A pretraining run under SLURM: sbatch --nodes 16 recipes/cluster/slurm.sh PRETRAIN… (what follows `dinov2 pretrain`)
#   sbatch --nodes 16 recipes/cluster/slurm.sh curated -o run --config vitl14-long --set parallel.sharding=hybrid
#   sbatch --nodes 16 recipes/cluster/slurm.sh curated -o run --config vitg14-long --set parallel.sharding=hybrid
# Not run by us: we had no SLURM. What it starts is what multinode.sh starts, which a test runs on two machines.
#SBATCH --job-name dinov2
#SBATCH --nodes 16
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 96
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --signal B:USR1@300
#SBATCH --open-mode append
set -euo pipefail
[[ $# -gt 0 ]] || { echo "usage: sbatch --nodes N slurm.sh DATA -o RUN --config RECIPE …" >&2; exit 2; }
: "${SLURM_JOB_ID:?start this with sbatch}"
# Not through `head`: it may leave before scontrol has written the rest, which pipefail takes for a failure.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}

# How long ranks have to save after a signal; also how long those that hang after another died stay (torch: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-45}
# srun does not take this from sbatch by itself; without it all ranks and loader workers would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
# Five minutes before its end the job is told: every rank saves, and the job queues again to go on from there.
stopping=''
again() {
  stopping=yes
  kill -TERM "$job" 2>/dev/null || true
}
trap again USR1 TERM

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-6}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m dinov2cli pretrain "$@" &
job=$!
code=0
wait "$job" || code=$?
if [[ -n $stopping ]]; then
  wait "$job" || true
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
