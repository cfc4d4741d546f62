#!/usr/bin/env bash
# One pretraining run over several machines, without a scheduler: start this on every machine with its number.
set -euo pipefail
usage() {
  cat >&2 <<'TEXT'
usage: multinode.sh --nodes N --node-rank I --master HOST [--gpus 8] [--port 29500] [--address A]
                    [--restarts 6] -- PRETRAIN…
  --nodes      machines in all; --node-rank numbers this one from 0
  --master     address of machine 0, which the others must reach at --port
  --address    of this machine, where the others cannot look it up by its host name
  --gpus       processes on each machine, one per GPU
  --restarts   how often all start again by themselves, from the last checkpoint, when a process has died
  PRETRAIN     what follows `dinov2 pretrain`; the output directory must be on a file system that all machines see

  ViT-L and ViT-g with the paper's settings, on 16 machines of 8 GPUs:
  multinode.sh --nodes 16 --node-rank 0 --master 10.0.0.1 -- curated -o run --config vitl14-long --set parallel.sharding=hybrid
  multinode.sh --nodes 16 --node-rank 0 --master 10.0.0.1 -- curated -o run --config vitg14-long --set parallel.sharding=hybrid
TEXT
  exit 2
}
nodes='' rank='' master='' gpus=8 port=29500 restarts=6 address=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --node-rank) rank=$2; shift 2 ;;
    --master) master=$2; shift 2 ;;
    --gpus) gpus=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --address) address=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --) shift; break ;;
    *) echo "multinode.sh: unknown option $1" >&2; usage ;;
  esac
done
[[ -n $nodes && -n $rank && -n $master && $# -gt 0 ]] || usage
# How long ranks have to save after a signal; also how long those that hang after another died stay (torch: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-45}
# The rendezvous lives on machine 0. With it the launch can start again when a process dies, on any machine.
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id dinov2 \
  --rdzv-conf "is_host=$([[ $rank == 0 ]] && echo true || echo false)" \
  ${address:+--local-addr "$address"} \
  -m dinov2cli pretrain "$@"
