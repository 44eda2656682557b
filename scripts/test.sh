#!/usr/bin/env bash
# Runs the tests, after setting up; arguments go to pytest. Without any: the fast ones, two files at a time.
# Everything: -m ""
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several ranks, and ranks must not fight for cores
(($#)) || set -- -n 2 --dist loadfile        # by file: runs that several tests look at are made once
exec "$python" -m pytest "$@"
