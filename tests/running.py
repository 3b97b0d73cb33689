"""Starting real training processes from tests, and reading what they left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from selfsup.checkpoint import TrainState, read_tensors
from selfsup.config import validate
from selfsup.data.pack import pack_arrays
from selfsup.ema import Ema
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe
from selfsup.saving import save_checkpoint

TESTS = Path(__file__).parent
ROOT = TESTS.parent

CONFIG = """
objective: {name: mae, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}
encoder: {img_size: 16, patch_size: 4, in_chans: 1, embed_dim: 32, depth: 4, num_heads: 2}
data: {mean: [0.4], std: [0.3]}
optim: {steps: 20, batch_size: 16, base_lr: 1.0e-2}
run: {workers: 0, log_every: 1, checkpoint_every: 3, picture_every: 0}
"""


def make_shards(folder: Path, samples: int = 83, per_shard: int = 30) -> Path:
    """Small grey images of structured noise in several shards of unequal size."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 4, 5, 1)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    pack_arrays(images, np.arange(samples) % 3, ["a", "b", "c"], folder, per_shard)
    return folder


def state_of(recipe: Recipe, seed: int, steps: int = 2) -> TrainState:
    """A run after some steps along random gradients: its weights and its optimizer."""
    torch.manual_seed(seed)
    objective = recipe.objective.build(recipe.encoder)
    optimizer = build_optimizer(recipe.optim, objective)
    for _ in range(steps):
        for p in objective.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    return TrainState(
        objective, optimizer, None, recipe, steps, steps * 256, {"index_fingerprint": "f", "order_version": 1}
    )


def save_untrained(folder: Path, content: dict, noise: float, facts: dict, step: int) -> Path:
    """A run folder as training leaves it, without the training: initial weights plus `noise`, running
    statistics too; their average, where the recipe keeps one, without it."""
    recipe = validate(Recipe, content)
    torch.manual_seed(recipe.seed)
    objective = recipe.objective.build(recipe.encoder)
    ema = None if recipe.optim.ema is None else Ema(objective, recipe.optim.ema)
    with torch.no_grad():
        for p in objective.parameters():
            p += noise * torch.randn_like(p)
        for name, value in objective.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value += noise * torch.rand_like(value)
    optimizer = build_optimizer(recipe.optim, objective)
    save_checkpoint(folder, TrainState(objective, optimizer, None, recipe, step, 1792, facts, ema))
    return folder


def write_config(folder: Path, shards: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{shards: {shards}, "))
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A warm process that forks training ranks (see launcher.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "launcher.py"), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **request) -> list[int]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list, log: Path, ranks: int = 1, **options) -> list[int]:
        """Forks the ranks of one run; returns their process ids."""
        arguments = [str(a) for a in arguments] + ["--run.expect-processes", str(ranks)]
        return self.ask(arguments=arguments, ranks=ranks, port=free_port(), options=options, log=str(log))

    def wait(self, pids: list[int]) -> list[int]:
        return self.ask(wait=pids)

    def run(self, arguments: list, log: Path, ranks: int = 1, **options) -> None:
        """A whole run; every rank must end well."""
        codes = self.wait(self.start(arguments, log, ranks, **options))
        assert codes == [0] * ranks, f"{codes}\n{log.read_text()}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it had already ended


def torchrun(ranks: int, arguments: list, options: dict | None = None) -> subprocess.CompletedProcess:
    """A run under the real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(TESTS / "launcher.py"), *map(str, arguments), "--run.expect-processes", str(ranks)]
    env = {**os.environ, "SELFSUP_TEST": json.dumps(options or {}), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def wait_for(condition, seconds: float = 60.0, pause: float = 0.001) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged step."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


def final_state(run: Path) -> dict[str, bytes]:
    """The bytes of the newest checkpoint that must not depend on interruptions."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    # Not the files' bytes: torch writes the header of a split state's files in no fixed order.
    tensors = {f"{part}/{k}": v for part in ("objective", "optimizer") for k, v in read_tensors(newest, part).items()}
    content = {k: v.numpy().tobytes() for k, v in tensors.items()}
    assert content
    return {**content, "counters": repr((state["step"], state["samples"], state["optimizer"])).encode()}


def first_gradients(run: Path) -> dict:
    """The gradients of a run's first step, out of Adam's first moment (1 - beta1) * g, in float64."""
    tensors = read_tensors(run / "checkpoints" / "step-00000001", "optimizer")
    return {k.split(":", 1)[1]: v.double() / 0.1 for k, v in tensors.items() if k.startswith("exp_avg:")}


def off(ours: dict, theirs: dict) -> float:
    """The largest distance of two states' tensors over the norm of the second's; of tensors near 0 over 1e-3."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[k].double(), theirs[k].double()) for k in theirs]
    return max(((a - b).norm() / max(b.norm(), 1e-3)).item() for a, b in pairs)


def read_trace(path: Path, kind: str, ranks: int, accumulation: int) -> list[list]:
    """Global batches in order: for each step the rows of micro-batch 0 of every rank, then micro-batch 1, ..."""
    per_rank = []
    for rank in range(ranks):
        lines = [json.loads(line) for line in Path(f"{path}.{rank}").read_text().splitlines()]
        per_rank.append([rows for found, rows in lines if found == kind])
    steps = min(map(len, per_rank)) // accumulation
    return [
        [
            row
            for a in range(accumulation)
            for rank in range(ranks)
            for row in per_rank[rank][step * accumulation + a]
        ]
        for step in range(steps)
    ]
