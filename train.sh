#!/usr/bin/env bash
# Trains: every argument goes to flame.train untouched (`bash train.sh -h` lists them); none trains the debug job.
# The exit code is 0; 2 when the job was refused; 75 when it was stopped and goes on when started again (docs/stopping.md);
# else torchrun's.
#
#   NNODE        nodes (1, or Slurm's)             NGPU         processes on each node (its visible GPUs, else 1)
#   LOG_RANK     local ranks shown, a list (0)     MASTER_ADDR  first node (localhost, or Slurm's first)
#   MASTER_PORT  any free one; 29500 and up with several nodes
#   FLAME_PYTHON the interpreter to use instead of the one scripts/setup.sh finds or makes
#
# torchrun keeps the whole output of every rank in a folder torchelastic_* of $TMPDIR; PET_LOG_DIR names another.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() {
  printf 'flame: %s\n' "$*" >&2
  exit 2
}
visible_gpus() {
  local devices count=0
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    count=${#devices[@]}
  elif command -v nvidia-smi >/dev/null; then
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  fi
  echo $((count > 0 ? count : 1))
}

python=$(bash "$root/scripts/setup.sh")
(($#)) || set -- --job.config_file "$root/configs/jobs/debug.toml"

export NNODE=${NNODE:-${SLURM_NNODES:-1}} NGPU=${NGPU:-$(visible_gpus)}
[[ $NNODE =~ ^[1-9][0-9]*$ ]] || refuse "NNODE: found '$NNODE', allowed are whole numbers from 1"
[[ $NGPU =~ ^[1-9][0-9]*$ ]] || refuse "NGPU: found '$NGPU', allowed are whole numbers from 1"
[[ ${LOG_RANK:-0} =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "LOG_RANK: found '$LOG_RANK', allowed is a list of ranks such as 0,3"
[[ ${MASTER_PORT:-0} =~ ^[0-9]{1,5}$ ]] || refuse "MASTER_PORT: found '$MASTER_PORT', allowed are ports up to 65535"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # flame is this checkout's, from any folder
((NGPU == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun would, without its warning
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
[[ -t 1 ]] || export NO_COLOR=${NO_COLOR:-1}

status=0
env -u WORLD_SIZE "$python" -m flame.preflight "$@" || status=$? # WORLD_SIZE: ranks ask it, other launchers leave it
case $status in
  0) ;;
  64) exit 0 ;; # it printed the help
  65) exec env -u WORLD_SIZE "$python" -m flame.train "$@" ;; # a dry run: one process speaks for all ranks
  *) exit "$status" ;;
esac

rendezvous=(--rdzv_backend c10d --rdzv_id "${SLURM_JOB_ID:-none}")
port=0
if ((NNODE > 1)); then
  port=$((29500 + ${SLURM_JOB_ID:-0} % 10000)) # one on which all nodes agree, and another for another Slurm job
  if [[ -z ${MASTER_ADDR:-} ]]; then
    [[ -n ${SLURM_JOB_NODELIST:-} ]] || refuse "MASTER_ADDR: not set; with NNODE=$NNODE it must name the first node"
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Said rather than guessed: torchrun recognises its own host by name, which fails where names are aliases.
    rendezvous+=(--rdzv_conf "is_host=$((${SLURM_NODEID:-0} == 0))")
  fi
fi

exec "$python" -m flame.runtime.launch --nnodes "$NNODE" --nproc_per_node "$NGPU" "${rendezvous[@]}" \
  --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-$port}" \
  --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 -m flame.train "$@"
