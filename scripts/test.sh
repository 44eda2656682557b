#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest. Without any: the fast tests, two files at a time.
# All tests: -m ""
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several ranks, which must not compete for cores
(($#)) || set -- -n 2 --dist loadfile        # by file: a run that several tests share is made once
exec "$python" -m pytest "$@"
