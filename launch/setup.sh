#!/usr/bin/env bash
# Makes .venv and installs selfsup into it. Usage: launch/setup.sh [EXTRA], e.g. launch/setup.sh test
# Reuses what is there: it installs again only when pyproject.toml has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"

python=""
for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: selfsup needs Python >= 3.11 on the PATH (found: $(python3 --version 2>&1 || true))" >&2
    exit 2
fi

stamp=".venv/installed-${extra:-base}"
for done in "$stamp" .venv/installed-*; do # any extra includes the base
    if [ "$done" = "$stamp" ] || [ -z "$extra" ]; then
        if [ -x .venv/bin/python ] && cmp -s pyproject.toml "$done"; then
            exit 0
        fi
    fi
done
if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "installing selfsup${extra:+[$extra]} into .venv (PyTorch is large: a few minutes, once)"
.venv/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar on -e ".${extra:+[$extra]}"
cp pyproject.toml "$stamp"
