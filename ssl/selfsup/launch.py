"""Starts `selfsup train` on several processes, of this machine or of a SLURM cluster.

selfsup launch CONFIG --where local --processes N [--key value ...]             torchrun on this machine
selfsup launch CONFIG --where slurm --processes N --nodes M [--key value ...]   sbatch launch/slurm.sbatch

The recipe is checked before anything starts. The plain command is printed, then run: nobody needs this one.

--processes N   on each machine; default 1
--nodes M       machines of the cluster; default 1
--resume        go on with the run that the folder holds; without it such a folder is refused
--carry-on      start the run, or go on with it: for scripts that are started again
--dry-run       check, print the command, start nothing

sbatch reads what else a job needs from its variables: SBATCH_TIMELIMIT=12:00:00, SBATCH_PARTITION=...
Exit code, local: that of the run, 0 finished, 2 a fault, 75 interrupted; slurm: sbatch's, when it is queued.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from selfsup import start
from selfsup.carry_on import command_for, holds_run, state_of
from selfsup.recipe import Recipe, load_recipe
from selfsup.train import INTERRUPTED

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""What torchrun passes on; of the last two it would otherwise die, and leave its ranks alone."""
GRACE = "300"
"""Seconds that torchrun gives ranks to save after a signal before it kills them; its own default is 30."""
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit code. Raises ValueError for what the user can mend."""
    parser = argparse.ArgumentParser(prog="selfsup launch", add_help=False, allow_abbrev=False)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--where", default="local", choices=("local", "slurm"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--carry-on", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    if options.help:
        print(__doc__)
        return 0
    if options.config is None:
        raise ValueError("expected a CONFIG; see selfsup launch --help")
    recipe = load_recipe(options.config, overrides)
    check(recipe, options.where, options.processes, options.nodes)
    check_folder(Path(recipe.run.dir), options.resume, options.carry_on)
    again = options.resume or options.carry_on
    if again and command_for(options.config, overrides) is None:
        return 0
    words = [str(options.config), *overrides]
    if options.where == "slurm":
        env, command = slurm_command(recipe, words, options.processes, options.nodes)
    else:
        env, command = local_command(words, options.processes, again)
    print(shlex.join([*(f"{key}={value}" for key, value in env.items()), *command]), flush=True)
    if options.dry_run:
        return 0
    if options.where == "slurm":
        if shutil.which(command[0]) is None:
            raise ValueError("sbatch: not found here; start this where jobs are submitted, or use --where local")
        return subprocess.run(command, env={**os.environ, **env}).returncode
    os.environ.update(env)
    if options.processes == 1:
        os.execv(command[0], command)  # signals and exit code are the run's own
    return under_torchrun(command[3:], Path(recipe.run.dir))


def check(recipe: Recipe, where: str, processes: int, nodes: int) -> None:
    """Raises ValueError for what would only show once the job has started."""
    if processes < 1 or nodes < 1:
        raise ValueError(f"--processes, --nodes: expected values >= 1, got {processes} and {nodes}")
    if where == "local" and nodes > 1:
        raise ValueError("--nodes: this machine is one; use --where slurm, or launch/nodes.yaml on each")
    world = processes * nodes
    if recipe.run.expect_processes not in (None, world):
        raise ValueError(
            f"run.expect_processes: expected {world} = --processes x --nodes, got {recipe.run.expect_processes}"
        )
    start.batch_plan(recipe, world)


def check_folder(run: Path, resume: bool, carry_on: bool) -> None:
    """Raises ValueError where the run folder holds a run and should not, as train does, or the reverse."""
    if resume and not holds_run(run):
        raise ValueError(f"--resume: {run} holds no run to go on with; leave it out")
    if not resume and not carry_on and list(run.glob("checkpoints/step-*")):
        raise ValueError(
            f"run.dir: {run} already holds a run; continue it with --resume, or choose another --run.dir"
        )


def local_command(words: list[str], processes: int, again: bool) -> tuple[dict[str, str], list[str]]:
    """Variables and command of a run on this machine. Several processes share its cores, unless
    OMP_NUM_THREADS is set: under torchrun each would otherwise have a single thread."""
    module = "selfsup.carry_on" if again else "selfsup.train"
    tail = ["-m", module, *words, "--run.expect-processes", str(processes)]
    if processes == 1:
        return {}, [sys.executable, *tail]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE}
    env = {name: os.environ.get(name, value) for name, value in wanted.items()}
    threads = env["OMP_NUM_THREADS"]
    print(f"threads    {threads} for each of {processes} processes, {cores} cores; OMP_NUM_THREADS sets it")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return env, [*command, "--signals-to-handle", SIGNALS, *tail]


def slurm_command(
    recipe: Recipe, words: list[str], processes: int, nodes: int
) -> tuple[dict[str, str], list[str]]:
    """Variables and command that submit the job; it runs under this interpreter."""
    if not SCRIPT.exists():
        raise ValueError(
            f"--where slurm: {SCRIPT} is not there, selfsup is installed without its checkout; clone it and "
            f"pip install -e it, or submit a copy of its launch/slurm.sbatch yourself"
        )
    gpus = [f"--gpus-per-node={processes}"] if recipe.run.device == "cuda" else []
    if recipe.run.device == "auto":
        print("devices    no GPUs are asked for: run.device is auto; for one a process add --run.device cuda")
    command = ["sbatch", f"--nodes={nodes}", f"--ntasks-per-node={processes}", *gpus, str(SCRIPT), *words]
    return {"PYTHON": os.environ.get("PYTHON", sys.executable)}, command


def under_torchrun(arguments: list[str], run: Path) -> int:
    """Becomes torchrun: no process more, and signals come where they should. Returns the run's exit code (torchrun
    makes 1 of all): 75 where this start wrote the outcome `interrupted`, else that of the first rank that failed."""
    before = changed(run)
    try:
        torchrun.main(arguments)
    except (ChildFailedError, SignalException) as stopped:
        if changed(run) != before and state_of(run) == "interrupted":
            return INTERRUPTED
        if isinstance(stopped, SignalException):
            return 128 + int(stopped.sigval)
        rank, failure = stopped.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            return failure.exitcode
        print(f"error: rank {rank} was killed: {failure.signal_name()}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def changed(run: Path) -> int | None:
    """When outcome.json was written, in nanoseconds; None where there is none. A run begins by removing it."""
    path = run / "outcome.json"
    return path.stat().st_mtime_ns if path.exists() else None
