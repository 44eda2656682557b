#!/usr/bin/env bash
# Makes the environment of rehearse.py in a folder, once:
#   bash scripts/rehearsal/setup.sh [WHERE]     # default: .rehearsal in this checkout; then export FLAME_REHEARSAL=WHERE
# A venv with a CUDA build of torch and flame's dependencies (6 GB, some minutes), and the stub libraries of this folder.
# Needs no GPU, driver or CUDA toolkit: Linux on x86-64, Python 3.10 to 3.12 and g++. A second call compiles the stub
# again and installs nothing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
torch=2.14.1 cuda=13.0 # the release whose calls of the CUDA runtime the stub answers, and the CUDA it was built with
mkdir -p "${1:-$root/.rehearsal}"
where=$(cd "${1:-$root/.rehearsal}" && pwd)
python=$where/venv/bin/python

installed() {
  "$python" -c "import torch, torchtitan, fla; assert torch.__version__.startswith('$torch+cu')" 2>/dev/null &&
    "$python" -m pip show --quiet nvidia-cuda-crt nvidia-cuda-cccl 2>/dev/null
}
if ! installed; then
  [[ -x $python ]] || python3 -m venv "$where/venv"
  # flame's own dependencies and their tested versions; torch alone is another one
  "$python" - "$root" "$where" <<'PY'
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
from pathlib import Path

root, where = map(Path, sys.argv[1:])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["float8"], "pytest"]
(where / "requirements.txt").write_text("\n".join(line for line in needed if not line.startswith("torch>")) + "\n")
pins = (root / "3rdparty/constraints.txt").read_text().splitlines()
(where / "constraints.txt").write_text("\n".join(line for line in pins if not line.startswith("torch==")) + "\n")
PY
  "$python" -m pip install --quiet --disable-pip-version-check -r "$where/requirements.txt" -c "$where/constraints.txt" \
    "torch==$torch" "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*" # headers alone
fi

packages=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
build=(g++ -O1 -shared -fPIC -std=c++17)
"${build[@]}" -I"$packages/nvidia/cu13/include" -o "$where/libcudart_stub.so" "$here/runtime.cpp" "$here/blas.cpp"
"${build[@]}" -Wl,-soname,libcuda.so.1 -o "$where/libcuda.so.1" "$here/driver.cpp" -ldl
echo "$where is ready: export FLAME_REHEARSAL=$where"
