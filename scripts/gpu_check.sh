#!/usr/bin/env bash
# What a GPU shows of flame, in nine minutes at most: bash scripts/gpu_check.sh    (docs/gpu_check.md)
# The same command goes on where it was stopped. `bash scripts/gpu_check.sh -h` lists the flags.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONSAFEPATH=1 # a file of the working folder stands in for no module
python=$(bash "$root/scripts/setup.sh")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout's flame
exec "$python" -m scripts.gpu_check "$@"
