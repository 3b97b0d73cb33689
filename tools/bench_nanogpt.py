"""Shakespeare, character level: nanoGPT and selfsup train nanoGPT's CPU recipe in turn, then both are scored alike.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python tools/shakespeare.py input.txt data/shakespeare
    python tools/bench_nanogpt.py runs/bench-nanogpt --nanogpt ../nanoGPT --text input.txt
    python tools/bench_nanogpt.py runs/bench-ours --sides selfsup               ours alone
    python tools/bench_nanogpt.py --help

nanoGPT runs its own data/shakespeare_char/prepare.py on --text, then its own train.py with the options of
its README for a CPU (tried with its commit 3adf61e): 4 layers, 4 heads, width 128, context 64, batch 12,
2,000 steps, no dropout, no compilation; it looks at its losses at the first and the last step only. selfsup
trains configs/clm/shakespeare-char.yaml, in fp32 like nanoGPT; --sides nanogpt selfsup selfsup-rope also trains it
with rotary positions in bf16. Each in a process of its own, in turn, in an order
swapped every round; a round is another seed for selfsup, nanoGPT has one. Counted is a whole process, from
start to end, imports, checkpoints and all.

The score is the mean loss over the whole validation text in consecutive windows of 64 characters, which is
the exact value of what nanoGPT estimates from random windows; the weights are those of the last step, which in
nanoGPT is number 2,001. They leave its process as safetensors: its checkpoint, a pickle, is not opened.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from bench_mae import machine
from bench_text_peers import nanogpt_model
from jaxtyping import Float, Int
from safetensors.torch import load_model
from text_folders import read_text
from torch import Tensor

from selfsup.checkpoint import load_objective
from selfsup.data.tokens import open_tokens
from selfsup.durable import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "clm" / "shakespeare-char.yaml"
CHARACTERS = 65
_PREPARE = """
import importlib.util, runpy, sys, types
if importlib.util.find_spec("requests") is None:  # wanted for a download that does not take place
    sys.modules["requests"] = types.ModuleType("requests")
runpy.run_path("prepare.py", run_name="__main__")
"""
# Its script as it is, in this process, for the weights it ends with.
_TRAIN = """
import sys
from safetensors.torch import save_model
out, *sys.argv[1:] = sys.argv[1:]
ran = {"__name__": "__main__"}
exec(compile(open("train.py").read(), "train.py", "exec"), ran)
save_model(ran["raw_model"], out)
"""
_ESTIMATE = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")

Side = Literal["nanogpt", "selfsup", "selfsup-rope"]
VARIANTS = {
    "selfsup": {},
    "selfsup-rope": {
        "--encoder.positions": "rope",
        "--encoder.attention": "reference",
        "--precision.mixed": "bf16",
    },
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    out: tyro.conf.Positional[Path]
    """A new folder for runs, logs and report.json."""
    sides: tuple[Side, ...] = ("nanogpt", "selfsup")
    """Who takes part."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT; its prepare.py writes into data/shakespeare_char there."""
    text: Path | None = None
    """input.txt, or the same compressed; for nanoGPT."""
    shards: Path = Path("data/shakespeare")
    """What tools/shakespeare.py made."""
    rounds: int = 1
    """Runs of each side."""
    steps: int = 2000
    """Optimizer steps; the recipe's is 2000."""
    threads: int = 1
    """Threads of each side."""

    def check(self) -> None:
        """Raises ValueError for options that do not go together."""
        if min(self.rounds, self.threads) < 1 or self.steps < 20:
            raise ValueError("--rounds, --threads: expected 1 or more; --steps 20")
        if self.out.exists():
            raise ValueError(f"{self.out}: exists; name a new folder")
        if "nanogpt" not in self.sides:
            return
        if self.nanogpt is None or self.text is None:
            raise ValueError(
                "nanogpt: needs --nanogpt CHECKOUT (git clone https://github.com/karpathy/nanoGPT) and --text "
                "input.txt; for ours alone: --sides selfsup"
            )
        if not (self.nanogpt / "train.py").is_file():
            raise ValueError(f"--nanogpt {self.nanogpt}: no train.py in it; name a checkout of nanoGPT")


def main(options: Options) -> int:
    """Runs, scores, prints and writes OUT/report.json; returns the exit code. Raises ValueError for faults."""
    options.check()
    validation = open_tokens(str(options.shards / "test-tokens"))
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True)
    if "nanogpt" in options.sides:
        prepare(options)
    order, runs = list(options.sides), {side: [] for side in options.sides}
    for turn in range(options.rounds):
        for side in order:
            folder = (options.out / f"{side}-{turn}").absolute()
            if side == "nanogpt":
                found = run_nanogpt(options, folder)
            else:
                text = validation.read(0, validation.tokens)
                found = run_selfsup(options, VARIANTS[side], folder, turn, text)
            runs[side].append(found)
            estimate = f", its own estimate {found['estimate']:.4f}" if "estimate" in found else ""
            print(
                f"{side:12s}  round {turn}  {found['seconds']:6.1f} s  validation loss {found['loss']:.4f}{estimate}",
                flush=True,
            )
        order.reverse()
    for side in runs.keys() - {"nanogpt"} if "nanogpt" in runs else ():
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(runs["nanogpt"], runs[side])]
        print(
            f"nanoGPT's time over that of {side}: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    report = {**machine(options, torch.device("cpu")), "runs": runs}
    write_atomically(options.out / "report.json", json.dumps(report, indent=1).encode())
    return 0


def timed(command: list[str], folder: Path, log: Path, threads: int) -> float:
    """Seconds that a command took, run in a folder. Raises ValueError with its last line where it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(log, "w") as out:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - began
    if done.returncode:
        last = log.read_text().strip().rsplit("\n", 1)[-1]
        raise ValueError(f"{' '.join(command[:3])} ended with {done.returncode}: {last}; see {log}")
    return seconds


def prepare(options: Options) -> None:
    """nanoGPT's own preparation of the text, in its checkout."""
    folder = options.nanogpt / "data" / "shakespeare_char"
    (folder / "input.txt").write_text(read_text(options.text, "name nanoGPT's input.txt"))
    timed([sys.executable, "-c", _PREPARE], folder, (options.out / "prepare.log").absolute(), 1)


def run_nanogpt(options: Options, folder: Path) -> dict[str, Any]:
    """nanoGPT's run: its time, its own estimate, and the score of its last weights."""
    keys = {
        "device": "cpu", "compile": False, "eval_iters": 20, "eval_interval": options.steps, "log_interval": 1,
        "block_size": 64, "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": options.steps,
        "lr_decay_iters": options.steps, "warmup_iters": options.steps // 20, "dropout": 0.0,
        "always_save_checkpoint": True, "dtype": "float32", "out_dir": str(folder),
    }  # fmt: skip
    weights, log = folder / "weights.safetensors", folder / "log.txt"
    command = [sys.executable, "-c", _TRAIN, str(weights), "config/train_shakespeare_char.py"]
    command += [f"--{key}={value}" for key, value in keys.items()]
    seconds = timed(command, options.nanogpt, log, options.threads)
    estimates = _ESTIMATE.findall(log.read_text())
    data = options.nanogpt / "data" / "shakespeare_char" / "val.bin"
    tokens = np.fromfile(data, dtype=np.uint16).astype(np.int64)
    module, sizes = nanogpt_model(options.nanogpt), ("n_layer", "n_head", "n_embd", "block_size")
    config = module.GPTConfig(
        vocab_size=CHARACTERS, dropout=0.0, bias=False, **{key: keys[key] for key in sizes}
    )
    model = module.GPT(config).eval()
    load_model(model, weights)
    loss = exact_loss(lambda x: model(x, x)[0], torch.from_numpy(tokens), config.block_size)
    step, _, estimate = estimates[-1]
    return {"seconds": seconds, "loss": loss, "estimate": float(estimate), "estimate_at": int(step)}


def run_selfsup(
    options: Options, variant: dict[str, str], folder: Path, seed: int, validation: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """Our run: its time, and the score of its last weights."""
    keys = {
        "--data.shards": str(options.shards.absolute() / "train-tokens"),
        "--run.dir": str(folder),
        "--run.threads": str(options.threads),
        "--optim.steps": str(options.steps),
        "--seed": str(seed),
        **variant,
    }
    words = [word for pair in keys.items() for word in pair]
    command = [sys.executable, "-m", "selfsup.train", str(CONFIG), *words]
    seconds = timed(command, ROOT, folder.with_name(f"{folder.name}.log"), options.threads)
    objective, recipe, checkpoint, _ = load_objective(folder)
    objective.eval()
    tokens, length = torch.from_numpy(validation), recipe.encoder.max_length
    loss = exact_loss(lambda x: objective.logits(objective.encoder(x)), tokens, length)
    return {"seconds": seconds, "loss": loss, "step": recipe.optim.steps, "checkpoint": str(checkpoint)}


@torch.no_grad()
def exact_loss(
    logits: Callable[[Int[Tensor, "b l"]], Float[Tensor, "b l v"]], tokens: Int[Tensor, " n"], length: int
) -> float:
    """Mean loss of every token but the first, each predicted once, from those before it in its window of `length`."""
    inputs, labels = tokens[:-1], tokens[1:]
    whole = len(inputs) // length * length
    rows = list(zip(inputs[:whole].view(-1, length).split(64), labels[:whole].view(-1, length).split(64)))
    if whole < len(inputs):
        rows.append((inputs[None, whole:], labels[None, whole:]))
    total = 0.0
    for x, y in rows:
        total += F.cross_entropy(logits(x).double().flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / len(inputs)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except ValueError as error:
        sys.exit(f"bench_nanogpt: {error}")
