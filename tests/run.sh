#!/usr/bin/env bash
# Installs selfsup with its test extras into .venv, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh test
exec .venv/bin/python -m pytest "$@"
