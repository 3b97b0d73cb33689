"""Kills a run under torchrun again and again, resumes it, and compares the end with a run nobody touched.

    python tools/digits.py data/digits
    python tools/chaos.py --kills 20 --terms 20 [--parallel fsdp2] [--background]

Two processes, `kill -9` in turn of one rank, of launcher and ranks, of the launcher alone, at a random moment of
the course (saves included), then a resume under torchrun; and SIGTERM to the launcher. For each: what was left
after how long, from which step the resumed run went on, and the largest difference between its final weights and
moments and those of the run that nobody stopped, which must be 0: bit for bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from selfsup.checkpoint import find_checkpoint, read_tensors

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "mae" / "quickstart.yaml"
STEPS, EVERY = 60, 4


def command(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, "-m", "selfsup.train", *map(str, arguments)]


def fresh(run: Path, options: list[str]) -> list[str]:
    steps = ["--optim.steps", STEPS, "--run.checkpoint-every", EVERY, "--run.log-every", 1]
    off = ["--run.picture-every", 0, "--run.monitor-every", 0, "--run.device", "cpu", "--run.threads", 1]
    return command(CONFIG, "--run.dir", run, "--run.expect-processes", 2, *steps, *off, *options)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def strike(how: str, launcher: subprocess.Popen, ranks: list[psutil.Process], rng: random.Random) -> float:
    """Kills, waits until launcher and ranks are gone; seconds that took."""
    began = time.perf_counter()
    targets = {"a rank": [rng.choice(ranks)], "all": [*ranks, launcher], "launcher": [launcher]}
    if how == "SIGTERM":
        launcher.send_signal(signal.SIGTERM)
    else:
        for process in targets[how]:
            process.kill()
    launcher.wait(timeout=120)
    _, alive = psutil.wait_procs(ranks, timeout=120)
    if alive:
        raise SystemExit(f"{how}: ranks outlived their launcher: {alive}")
    return time.perf_counter() - began


def difference(run: Path, whole: Path) -> float:
    """Between the last checkpoints' weights and moments."""
    states = [
        {f"{part}/{k}": v for part in ("objective", "optimizer") for k, v in read_tensors(path, part).items()}
        for path in (find_checkpoint(run)[0], find_checkpoint(whole)[0])
    ]
    if states[0].keys() != states[1].keys() or any(f"step-{STEPS:08d}" != find_checkpoint(r)[0].name for r in (run, whole)):
        raise SystemExit(f"{run}: not the same state")
    return max((states[0][k].double() - states[1][k].double()).abs().max().item() for k in states[0])


def one(how: str, folder: Path, seed: int, options: list[str], whole: Path) -> dict:
    rng, run = random.Random(seed), folder / f"{how.replace(' ', '-')}-{seed}"
    with (folder / f"{run.name}.log").open("w") as log:
        launcher = subprocess.Popen(fresh(run, options), stdout=log, stderr=log)
        aim = rng.randrange(1, STEPS - 8)
        while steps_done(run) < aim:
            if launcher.poll() is not None:
                raise SystemExit(f"{run.name}: ended by itself\n{Path(log.name).read_text()}")
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        ranks = [p for p in psutil.Process(launcher.pid).children() if "selfsup.train" in p.cmdline()]
        seconds = strike(how, launcher, ranks, rng)
        left = json.loads((run / "outcome.json").read_text())["state"] if (run / "outcome.json").exists() else "no outcome"
        went_on = int(find_checkpoint(run)[0].name[5:]) if list(run.glob("checkpoints/step-*")) else 0
        resumed = subprocess.run(command("--resume", run), stdout=log, stderr=log)
    if resumed.returncode:
        raise SystemExit(f"{run.name}: resume failed\n{Path(log.name).read_text()}")
    return {"how": how, "aim": aim, "left": left, "from": went_on, "seconds": seconds, "difference": difference(run, whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--background", action="store_true")
    arguments = parser.parse_args()
    options = ["--run.parallel", arguments.parallel, "--run.background-checkpoints", str(arguments.background).lower()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole"
        subprocess.run(fresh(whole, options), check=True, stdout=subprocess.DEVNULL)
        kinds = ["a rank", "all", "launcher"]
        plan = [kinds[i % 3] for i in range(arguments.kills)] + ["SIGTERM"] * arguments.terms
        rows = []
        for seed, how in enumerate(plan):
            rows.append(one(how, folder, seed, options, whole))
            print("{how:9} at step {aim:2}: {left:11} after {seconds:5.2f} s, went on from {from:2}, "
                  "difference {difference:g}".format(**rows[-1]), flush=True)  # fmt: skip
    for how in dict.fromkeys(plan):
        mine = [row for row in rows if row["how"] == how]
        ends = sorted(row["seconds"] for row in mine)
        states = {s: sum(row["left"] == s for row in mine) for s in sorted({row["left"] for row in mine})}
        print(f"{how}: {len(mine)} times, {states}, over after {ends[0]:.1f} to {ends[-1]:.1f} s (median "
              f"{ends[len(ends) // 2]:.1f}), largest difference {max(row['difference'] for row in mine):g}")  # fmt: skip


if __name__ == "__main__":
    main()
