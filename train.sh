#!/usr/bin/env bash
# Trains. Every argument goes to flame.train untouched (`bash train.sh -h` lists them); without any, the debug job runs.
# Exit code: 0; 2 if the job was rejected; 75 if it was stopped, and resumes when started again (docs/stopping.md); else
# the launcher's.
#
#   NNODE        number of nodes (1, or Slurm's)        NGPU         processes per node (its visible GPUs, else 1)
#   LOG_RANK     local ranks to show, a list (0)        MASTER_ADDR  first node (localhost, or Slurm's first)
#   MASTER_PORT  any free port; 29500 and up with several nodes
#   FLAME_PYTHON interpreter to use instead of the one that scripts/setup.sh finds or makes
set -euo pipefail
trap 'exit 130' INT

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
reject() {
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

export PYTHONSAFEPATH=1 # a file of the working folder stands in for no module; see flame/config/user_module.py
python=$(bash "$root/scripts/setup.sh")
(($#)) || set -- --job.config_file "$root/configs/jobs/debug.toml"

export NNODE=${NNODE:-${SLURM_NNODES:-1}} NGPU=${NGPU:-$(visible_gpus)}
[[ $NNODE =~ ^[1-9][0-9]*$ ]] || reject "NNODE: found '$NNODE', must be an integer of 1 or more"
[[ $NGPU =~ ^[1-9][0-9]*$ ]] || reject "NGPU: found '$NGPU', must be an integer of 1 or more"
[[ ${LOG_RANK:-0} =~ ^[0-9]+(,[0-9]+)*$ ]] || reject "LOG_RANK: found '$LOG_RANK', must be a list of ranks such as 0,3"
for rank in $(tr , ' ' <<<"${LOG_RANK:-0}"); do
  ((10#$rank < NGPU)) || reject "LOG_RANK: found '$LOG_RANK', must be ranks of this node, below NGPU=$NGPU"
done
[[ ${MASTER_PORT:-0} =~ ^[0-9]{1,5}$ ]] && ((10#${MASTER_PORT:-0} <= 65535)) || reject "MASTER_PORT: found '$MASTER_PORT', must be a port, at most 65535"
for name in SLURM_JOB_ID SLURM_NODEID; do # bash evaluates what it computes with
  [[ ${!name:-0} =~ ^[0-9]{1,18}$ ]] || reject "$name: found '${!name}', must be a number"
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout's flame, from any folder
((NGPU == 1)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun would, without its warning
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
[[ -t 1 ]] || export NO_COLOR=${NO_COLOR:-1}

start=(env -u WORLD_SIZE) # ranks read it; other launchers leave it
if env --block-signal=INT true 2>/dev/null; then
  start+=(--block-signal=INT) # until Python handles it: Ctrl-C in its first tenth of a second would be a traceback
fi
status=0
"${start[@]}" "$python" -m flame.preflight "$@" || status=$?
case $status in
  0) ;;
  64) exit 0 ;; # it has printed the help, or that the run is complete
  65) exec "${start[@]}" "$python" -m flame.dry_run "$@" ;; # a dry run: one process reports for all ranks
  *) exit "$status" ;;
esac

rendezvous=(--rdzv_backend c10d --rdzv_id "${SLURM_JOB_ID:-none}")
port=0
if ((NNODE > 1)); then
  port=$((29500 + 10#${SLURM_JOB_ID:-0} % 10000)) # the same on all nodes, and another for each Slurm job
  if [[ -z ${MASTER_ADDR:-} ]]; then
    # Slurm's own command; a container may lack it
    [[ -n ${SLURM_JOB_NODELIST:-} ]] && read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>&-) ||
      reject "MASTER_ADDR: found nothing, must be the first of NNODE=$NNODE nodes"
    # Set rather than guessed: torchrun recognizes its own host by name, which fails where names are aliases.
    rendezvous+=(--rdzv_conf "is_host=$((10#${SLURM_NODEID:-0} == 0))")
  fi
fi

ranks="$NGPU rank$( ((NGPU == 1)) || echo s)"
((NNODE == 1)) || ranks+=" on this node, one of $NNODE"
(printf '%s I starting %s\n' "$(date +%T)" "$ranks") || true # in a shell of its own: nobody may be reading
start+=("$python" -m flame.runtime.launch)
((NNODE * NGPU > 1)) || exec "${start[@]}" -m flame.train "$@"
exec "${start[@]}" --nnodes "$NNODE" --nproc_per_node "$NGPU" "${rendezvous[@]}" \
  --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-$port}" \
  --local-ranks-filter "${LOG_RANK:-0}" -m flame.train "$@"
