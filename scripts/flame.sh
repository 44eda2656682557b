#!/usr/bin/env bash
# Everything but training, with flame's own Python, from any folder: bash scripts/flame.sh data show exp/mine --step 12
# `bash scripts/flame.sh -h` lists the commands.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONSAFEPATH=1 # a file of the working folder stands in for no module; see flame/config/user_module.py
python=$(bash "$root/scripts/setup.sh")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this checkout's flame
exec "$python" -m flame.config.commands "$@"
