#!/usr/bin/env bash
# Prints the Python to use on stdout, after making .venv in the repository if needed; progress goes to stderr.
#   python=$(bash scripts/setup.sh)
# In order: FLAME_PYTHON if set; the active python if it finds this checkout's flame and torchtitan; else .venv, which
# is installed again if pyproject.toml or the pins have changed, or if an earlier install was interrupted.
# pip chooses the build of torch (CPU, a CUDA version): set PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS as for
# any other pip install.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log() { printf 'flame: %s\n' "$*" >&2; }

if [[ -n ${FLAME_PYTHON:-} ]]; then
  type -P "$FLAME_PYTHON" >/dev/null || {
    log "FLAME_PYTHON: found '$FLAME_PYTHON', must be an executable"
    exit 2
  }
  echo "$FLAME_PYTHON"
  exit
fi

# Prints the active interpreter if it is not in our .venv and finds this checkout, the current folder aside.
active_python() {
  python3 - "$root" <<'PY' 2>/dev/null
import os, sys
from importlib.util import find_spec

root, sys.path = os.path.realpath(sys.argv[1]), [p for p in sys.path if p]
flame = find_spec("flame")
ours = flame and flame.origin and os.path.realpath(flame.origin) == os.path.join(root, "flame", "__init__.py")
found = ours and find_spec("torch") and find_spec("torchtitan")
if not found or os.path.realpath(sys.prefix) == os.path.join(root, ".venv"):
    sys.exit(1)
print(sys.executable)
PY
}

installed() { # the stamp is written last, so an interrupted install has none
  [[ -x $venv/bin/python && -f $venv/flame.stamp && $(<"$venv/flame.stamp") == "$stamp" ]]
}

new_venv() {
  local candidate
  for candidate in python3 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      log "making $venv with $("$candidate" -V)"
      "$candidate" -m venv "$venv" >&2 && return
      log "$candidate could not make $venv; remove that folder, or set FLAME_PYTHON, and try again"
      exit 2
    fi
  done
  log "python3: found $(python3 -V 2>&1 || true), must be Python 3.10 or newer with its venv module"
  exit 2
}

if active_python; then exit; fi

stamp="$(cat "$root/pyproject.toml" "$root/3rdparty/constraints.txt" | cksum) $root" # a moved checkout installs again
if ! installed; then
  # Several nodes may start at once on one shared folder: one installs, the others wait.
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock -n 9 || { log "waiting for another setup of $root" && flock 9; }
  fi
  if ! installed; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || new_venv
    cd "$root"
    pip=("$venv/bin/python" -m pip install --disable-pip-version-check -c 3rdparty/constraints.txt)
    log "installing torch (1 of 2; a few minutes in all, once)"
    "${pip[@]}" --quiet torch >&2
    log "installing flame and the rest (2 of 2)"
    extras=dev
    "$venv/bin/python" -c 'import importlib.metadata as m; assert "triton" in str(m.requires("torch"))' 2>/dev/null ||
      extras=dev,cpu # this build of torch does not require triton
    "${pip[@]}" --quiet -e ".[$extras]" >&2
    echo "$stamp" >"$venv/flame.stamp"
  fi
fi
echo "$venv/bin/python"
