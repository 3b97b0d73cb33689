"""Trains a recipe, or goes on with it: what a launcher runs that starts the same command again.

python -m selfsup.carry_on CONFIG [--section.key value ...] [--init-from DIR] [--as-seed N]

As `selfsup train`, but where the run folder holds this very run already, it is resumed, and a finished one is
left as it is. For torchrun with restarts, SLURM's requeue, Kubernetes and spot machines (see launch/). All
ranks decide alike: none writes to the run folder before all have met.

--as-seed N: seed N, in the folder seed-N of the recipe's run.dir; for arrays of jobs.
"""

if __name__ == "__main__":  # as train.py does
    from selfsup.stop import follow_launcher

    follow_launcher()

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from selfsup import dist, start, train
from selfsup.config import read_yaml, validate
from selfsup.recipe import Recipe, load_recipe

MAY_CHANGE = ("run.", "data.shards", "data.tokenizer")  # as recipe.resumed has it


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns train's exit code: 0 finished (before, too), 2 a fault, 75 interrupted."""
    parser = argparse.ArgumentParser(prog="selfsup.carry_on", add_help=False, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--init-from", type=Path)
    parser.add_argument("--as-seed", type=int)
    options, overrides = parser.parse_known_args(arguments)
    try:
        command = command_for(options.config, overrides, options.init_from, options.as_seed)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # the others find the same
            lines = [f"error: {line}" for line in str(error).splitlines()]
            print("\n".join(lines), file=sys.stderr, flush=True)
        return 2
    return 0 if command is None else train.main(command)


def command_for(
    config: Path, overrides: list[str], weights: Path | None = None, seed: int | None = None
) -> list[str] | None:
    """The arguments of `selfsup train` that start this run or go on with it; None where it has finished.

    Raises ValueError for a fault of the recipe, and where the folder holds a run of another one.
    """
    if seed is not None:
        folder = Path(load_recipe(config, overrides).run.dir) / f"seed-{seed}"
        overrides = [*overrides, "--seed", str(seed), "--run.dir", str(folder)]
    recipe = load_recipe(config, overrides)
    run = Path(recipe.run.dir)
    if not holds_run(run):
        return [str(config), *overrides, *([] if weights is None else ["--init-from", str(weights)])]
    kept = validate(Recipe, read_yaml(run / "config.yaml"))
    require_same(recipe, kept, run)
    if state_of(run) == "finished":
        start.say(f"{run}: finished before, nothing to do")
        return None
    options = changes(recipe, kept)
    if options:
        start.say(f"{run}: going on with {' '.join(options)}")
    return ["--resume", str(run), *options]


def holds_run(run: Path) -> bool:
    """Whether `train --resume` would take it: it is described, or has a checkpoint."""
    return (run / "environment.json").exists() or bool(list(run.glob("checkpoints/step-*")))


def state_of(run: Path) -> str | None:
    """What outcome.json says of the last start; None where it was killed, or still runs."""
    path = run / "outcome.json"
    return json.loads(path.read_text())["state"] if path.exists() else None


def require_same(asked: Recipe, kept: Recipe, run: Path) -> None:
    """Raises ValueError, a line a key, where a folder's run is not the one that is asked for."""
    was, now = flat(kept.model_dump(mode="json")), flat(asked.model_dump(mode="json"))
    faults = [
        f"{key}: {run} holds a run with {was.get(key)}, got {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if not key.startswith(MAY_CHANGE) and was.get(key) != now.get(key)
    ]
    if faults:
        raise ValueError("\n".join([*faults, "run.dir: choose another for this recipe"]))


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted keys; lists stay whole."""
    if not isinstance(content, dict):
        return {prefix: content}
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= flat(value, f"{prefix}.{key}" if prefix else key)
    return result


def changes(asked: Recipe, kept: Recipe) -> list[str]:
    """What a resumed run may be given and is asked to do otherwise than before, in the YAML or after it."""
    was, now = flat(kept.model_dump(mode="json")), flat(asked.model_dump(mode="json"))
    options = []
    for key in sorted(now):
        if key.startswith(MAY_CHANGE) and key != "run.dir" and was.get(key) != now[key]:
            value = json.dumps(now[key]) if not isinstance(now[key], str) else now[key]
            options += [f"--{key.replace('_', '-')}", value]
    return options


if __name__ == "__main__":
    sys.exit(dist.finish(main()))
