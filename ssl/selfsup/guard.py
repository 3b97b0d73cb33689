"""Steps that are not finite: all processes agree, the step is left out within a budget, beyond it the run stops."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from selfsup import dist, sharding
from selfsup.batch import ImageBatch, TextBatch
from selfsup.data.views import ViewBatch
from selfsup.objectives.base import Objective
from selfsup.optim import RESCUE

_MOVING = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that a forward pass changes: batch norm's."""
FILE = "skipped.jsonl"


def gradient_norm(accelerator: Accelerator, objective: Objective) -> Tensor:
    """The norm of the whole gradient, unscaled (fp16), over all processes' parts: a scalar on the device."""
    accelerator.unscale_gradients()
    return sharding.whole(torch.nn.utils.get_total_norm(_gradients(objective)))


def clip(objective: Objective, most: float | None, norm: Tensor) -> None:
    """Shortens a gradient of that norm to `most`, where that is given and it is longer; as torch's own, which takes
    no plain norm for split gradients, with 1e-6 added to the norm."""
    if most is not None:
        parts = [sharding.local(grad) for grad in _gradients(objective)]
        torch._foreach_mul_(parts, (most / (norm + 1e-6)).clamp(max=1.0))


def _gradients(objective: Objective) -> list[Tensor]:
    return [p.grad for p in objective.parameters() if p.grad is not None]


class Guard:
    """Keeps weights, averages and batch norm's statistics from a loss or gradient that is NaN or infinite."""

    def __init__(
        self,
        objective: Objective,
        run_dir: Path,
        budget: int,
        skipped: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """budget, skipped: steps of the whole run that may be, and have been, left out. scaler: of fp16; it leaves
        out steps with an infinite gradient itself, as it must to find its scale. They do not count as long as the
        scale is above 1: below, it is not the scale's fault."""
        self._objective, self._file, self._budget, self._scaler = objective, run_dir / FILE, budget, scaler
        self._moving = [b for name, b in objective.named_buffers() if name.endswith(_MOVING)]
        self._kept = [b.clone() for b in self._moving]
        self.skipped = skipped

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step: what its forward passes will change."""
        if self._moving:
            torch._foreach_copy_(self._kept, self._moving)

    def refuses(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether any process has a loss (its own sum) or gradient norm that is not finite. The same everywhere.

        Waits for the device: without that the weights would be gone before it is known.
        """
        norm = norm.to(loss.device)
        judged = self._scaler is None or self._scaler.get_scale() <= 1
        wrong = ~(loss.isfinite() & norm.isfinite()) if judged else ~loss.isfinite()
        return bool(dist.all_reduce(wrong.float()).item())

    @torch.no_grad()
    def skip(
        self, step: int, batches: Sequence[ImageBatch | ViewBatch | TextBatch], loss: float, norm: float
    ) -> str:
        """Undoes what the step changed, counts it, writes its samples to RUN/skipped.jsonl; one line for people."""
        if self._moving:
            torch._foreach_copy_(self._moving, self._kept)
        if self._scaler is not None:
            self._scaler.update(self._scaler.get_scale())  # forgets this step's unscaling, keeps the scale
        self.skipped += 1
        broken = [
            name for name, p in self._objective.named_parameters()
            if p.grad is not None and not sharding.local(p.grad).isfinite().all()
        ]  # fmt: skip
        samples = [
            [list(map(int, row)) for row in zip(b.epoch.tolist(), b.position.tolist(), b.index.tolist())]
            for b in batches
        ]
        mine = {"rank": dist.rank(), "loss": repr(loss), "parameters": broken, "samples": samples}
        ranks = [json.loads(text) for text in dist.gather_texts(json.dumps(mine))]
        if dist.rank() == 0:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, "grad_norm": repr(norm), "ranks": ranks}) + "\n")
        where = [r["rank"] for r in ranks if not math.isfinite(float(r["loss"]))]
        what = f"loss not finite on process {', '.join(map(str, where))}" if where else f"gradient norm {norm}"
        return f"step {step + 1}: {what}, its samples are in {self._file}"

    @property
    def spent(self) -> bool:
        """Whether more steps were left out than the budget has."""
        return self.skipped > self._budget

    def verdict(self, saved: Path) -> str:
        """What to tell the user where the budget is spent; saved: the checkpoint of before the step."""
        return (
            f"run.skip_budget: {self._budget} steps may be skipped in a run, this is one more: stopped. {saved} holds "
            f"the state before this step, and on {dist.world_size()} processes `selfsup train --resume "
            f"{self._file.parent}` replays it. {RESCUE}, or resume with a larger --run.skip-budget"
        )
