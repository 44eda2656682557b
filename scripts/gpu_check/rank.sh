#!/usr/bin/env bash
# The Python that torchrun starts a rank with (PYTHON_EXEC): -u -m flame.train FLAGS
shift 3
exec "$FLAME_PYTHON" -m scripts.gpu_check.rank "$@"
