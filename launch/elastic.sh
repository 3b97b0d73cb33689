#!/usr/bin/env bash
# torchrun that starts the ranks again when one is lost, and goes on with fewer or more machines when those come and
# go; the run resumes by itself from its last checkpoint (python -m selfsup.carry_on). On every machine:
#   NODES=1:4 PROCESSES=8 RDZV=HOST:29400 launch/elastic.sh CONFIG [--key value ...]
#
# - NODES: machines, at least:at most; default 1. PROCESSES: on each; default 1. RDZV: where they meet, HOST being one of
#   them; default this machine alone. HOST is the one machine whose loss ends the run. JOB: a name of the run, the
#   same on all; default selfsup. RESTARTS: how often ranks may be lost, or told to leave elsewhere, default 10; machines that join do not count.
# - optim.batch_size must divide by every number of processes that may come (say 1, 2, 3, 4 machines: by 3 too), or
#   the run refuses to start on that one. Do not give --run.expect-processes. Losses are then equal within rounding,
#   and bit for bit as long as the number stays the same.
# - After a machine was lost the others notice within 15 s, meet again, and wait 30 s for latecomers (RDZV_CONF).
# - To end it: SIGTERM to torchrun on every machine. A signal to a rank ends all ranks, and torchrun starts them again.
# - torchrun cannot tell a fault that will come again (exit code 2): it tries that RESTARTS times as well.
set -euo pipefail

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x .venv/bin/python ] || PYTHON="$PWD/.venv/bin/python"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Or ranks that start again find the addresses of those before them in the store that torchrun shares between starts,
# and wait for ever (pytorch#135712; with torch 2.14.1 about every third restart here).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # s to save after a signal; else 30
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-1}" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV:-localhost:0}" --rdzv-id "${JOB:-selfsup}" \
    --rdzv-conf "${RDZV_CONF:-last_call_timeout=30}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    -m selfsup.carry_on "$@"
