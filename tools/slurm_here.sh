#!/usr/bin/env bash
# A real SLURM on this one machine, for trying launch/slurm.sbatch where there is no cluster.
#   tools/slurm_here.sh start [FOLDER]    installs Debian's packages if needed, starts munged, slurmctld, slurmd
#   tools/slurm_here.sh status [FOLDER]   sinfo and squeue
#   tools/slurm_here.sh stop [FOLDER]     cancels all jobs, ends the three daemons; the packages stay
# FOLDER holds configuration, state and logs, nothing is written to /etc: default /tmp/slurm-here. Then
#   export SLURM_CONF=FOLDER/slurm.conf; sbatch ...
# Needs root (slurmd starts jobs as their owner) and Debian or Ubuntu. No cgroups, no accounting, loopback only.
# SLURM_HERE_CPUS: how many CPUs it offers, default all; more than there are is allowed (jobs then share them).
set -euo pipefail

verb="${1:-}"
folder="$(realpath --canonicalize-missing "${2:-/tmp/slurm-here}")"
cpus="${SLURM_HERE_CPUS:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)}" # nproc would heed these
host="$(hostname -s)"

fail() {
    echo "error: slurm_here: $*" >&2
    exit "${code:-2}"
}
cannot() { # SLURM is not to be had on this machine
    code=3 fail "$@"
}

install_packages() {
    local missing=()
    command -v munged mungekey >/dev/null || missing+=(munge)
    command -v slurmctld >/dev/null || missing+=(slurmctld)
    command -v slurmd >/dev/null || missing+=(slurmd)
    command -v sbatch >/dev/null || missing+=(slurm-client)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || cannot "${missing[*]} not found, and no apt-get to install them with"
    echo "installing ${missing[*]}"
    local log="$folder/apt.log" apt=(apt-get -o DPkg::Lock::Timeout=120 -o Acquire::http::Timeout=20)
    export DEBIAN_FRONTEND=noninteractive
    "${apt[@]}" update >"$log" 2>&1 && "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 \
        || cannot "cannot install ${missing[*]} (no network?): $(tail -n 1 "$log")"
}

free_port() { # from $1 upwards
    local port="$1"
    while (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

configure() {
    local control node
    control="$(free_port $((16800 + $$ % 1000)))"
    node="$(free_port $((control + 1)))"
    cat >"$folder/slurm.conf" <<END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control
SlurmdPort=$node
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; 5 is the least, 120 the default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=here Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
}

is_running() { # $1: munged, slurmctld or slurmd of this folder
    local pid
    pid="$(cat "$folder/$1.pid" 2>/dev/null)" && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

is_alive() { # a zombie is not, whenever its parent looks
    [[ "$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null)" =~ ^[^ZX] ]]
}

start() {
    [ "$(id -u)" = 0 ] || cannot "must be root: slurmd starts jobs as their owner"
    mkdir -p "$folder"/{state,spool}
    chmod go+rx "$folder" # munged and jobs of other users reach its socket through it
    install_packages
    if ! is_running munged; then
        [ -f "$folder/munge.key" ] || mungekey --create --keyfile="$folder/munge.key"
        munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
            --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" \
            || fail "munged does not start, see $folder/munged.log"
    fi
    if ! is_running slurmctld; then
        is_running slurmd || configure # otherwise a slurmd would be left that listens elsewhere
        slurmctld -f "$folder/slurm.conf" || fail "slurmctld does not start, see $folder/slurmctld.log"
    fi
    is_running slurmd || slurmd -f "$folder/slurm.conf" || fail "slurmd does not start, see $folder/slurmd.log"
    export SLURM_CONF="$folder/slurm.conf"
    for _ in $(seq 150); do
        if [[ "$(sinfo --noheader --format=%T 2>/dev/null)" =~ ^(idle|mixed|allocated)$ ]]; then
            echo "SLURM with $cpus CPUs is up: export SLURM_CONF=$folder/slurm.conf"
            return
        fi
        sleep 0.2
    done
    fail "no node came up in 30 s, see $folder/slurmctld.log and $folder/slurmd.log"
}

status() {
    export SLURM_CONF="$folder/slurm.conf"
    is_running slurmctld || fail "nothing runs in $folder"
    sinfo
    squeue
}

stop() {
    export SLURM_CONF="$folder/slurm.conf"
    if is_running slurmctld; then
        scancel --signal=KILL --full --user=root 2>/dev/null || true
        scancel --user=root || true
        for _ in $(seq 100); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    local daemon pid
    for daemon in slurmctld slurmd munged; do
        is_running "$daemon" || continue
        pid="$(cat "$folder/$daemon.pid")"
        kill "$pid"
        for _ in $(seq 100); do
            is_alive "$pid" || break
            sleep 0.1
        done
        ! is_alive "$pid" || fail "$daemon does not end"
    done
    echo "SLURM in $folder is down"
}

case "$verb" in
    start | stop | status) "$verb" ;;
    *) fail "expected start, stop or status, got '$verb'" ;;
esac
