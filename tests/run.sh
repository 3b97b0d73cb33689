#!/usr/bin/env bash
# Installs selfsup with its test extras into .venv, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh test
export OMP_NUM_THREADS=1  # one thread a process: two on a busy machine are slower than one
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
