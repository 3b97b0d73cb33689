"""Numbers of a run: metrics.jsonl (full precision), TensorBoard, and one progress line."""

import json
import time
from pathlib import Path

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from selfsup.durable import write_atomically


class MetricsLog:
    """Writes a run's metrics from one rank. A resumed run drops what lies beyond its checkpoint."""

    def __init__(self, run_dir: Path, start_step: int, steps: int):
        path = run_dir / "metrics.jsonl"
        kept = _lines_up_to(path, start_step)
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a")
        self._healthy: int | None = None
        self.collapsed_at: int | None = None
        """The step from which on every measurement said `collapsed`; None where the last one did not."""
        for line in map(json.loads, kept):
            self._judge(line["step"], line.get("collapsed"))
        self._board = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)
        # On a terminal a bar with rate and remaining time; elsewhere (disable=None) the plain lines below.
        self._bar = tqdm(total=steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line. `values` hold plain Python numbers; a value that is not known is left out by the caller."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name in _SHOWN)
        if self._judge(step, values.get("collapsed")):
            before = "" if self._healthy is None else f" (at step {self._healthy} they were not)"
            measured = ", ".join(f"{name} {values[name]:.3g}" for name in _SPREAD if name in values)
            print(
                f"step {step}: COLLAPSED: features or embeddings are nearly the same for every image, or on a "
                f"line{before}: {measured}; the loss does not tell",
                flush=True,
            )
        if self._bar.disable:
            print(f"{time.strftime('%H:%M:%S')}  step {step}/{self._bar.total}  {shown}", flush=True)
        else:
            self._bar.set_postfix_str(shown)

    def _judge(self, step: int, collapsed: float | None) -> bool:
        """Takes a measurement in, if the line has one; whether a collapse begins with it."""
        if collapsed == 0:
            self._healthy, self.collapsed_at = step, None
        begins = collapsed == 1 and self.collapsed_at is None
        if begins:
            self.collapsed_at = step
        return begins

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Pictures (3, h, w) in [0, 1] into TensorBoard."""
        for name, picture in pictures.items():
            self._board.add_image(name, picture, step)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        """Markdown into TensorBoard."""
        for name, text in texts.items():
            self._board.add_text(name, text, step)

    def distributions(self, step: int, values: dict[str, Tensor]) -> None:
        """Histograms of named numbers into TensorBoard."""
        for name, numbers in values.items():
            self._board.add_histogram(name, numbers, step)

    def histograms(self, step: int, module: nn.Module) -> None:
        """Histograms of every trainable parameter's weights and gradient, as they stand, into TensorBoard.

        Called after the optimizer's step they are the gradients it got, unscaled and clipped, and the
        weights it left. A tensor that is not finite has no histogram; how many there were is printed.
        """
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        tensors = {f"weights/{name}": p.detach() for name, p in trainable}
        tensors |= {f"gradients/{name}": p.grad for name, p in trainable if p.grad is not None}
        finite = {name: values for name, values in tensors.items() if values.isfinite().all()}
        for name, values in finite.items():
            self._board.add_histogram(name, values, step)
        if len(finite) < len(tensors):
            print(
                f"step {step}: {len(tensors) - len(finite)} of {len(tensors)} tensors are not finite: no histogram"
            )

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.close()
        self._file.close()
        self._board.close()


_SHOWN = ("loss", "lr", "images_per_s", "tokens_per_s", "data_wait", "mfu")
_SPREAD = ("feature_std", "rankme", "embedding_std", "embedding_rankme")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of an earlier run up to and including `step`; a torn last line is dropped."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: damaged: expected one JSON object with a step a line; move it away"
        ) from None


class StepClock:
    """Splits wall time between waiting for data and everything else."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for the loader."""
        self._waited += seconds

    def step(self) -> None:
        """One step done."""
        self._steps += 1

    def read(
        self, samples_per_step: int, unit: tuple[str, int], flops_per_sample: float, peak: float | None
    ) -> dict[str, float]:
        """images_per_s or tokens_per_s, data_wait (share of wall time), and mfu where `peak` (FLOP/s, all
        devices) is known.

        unit: what is counted, and how many of them a sample is. Covers the time since the last call, then
        starts anew.
        """
        elapsed = time.perf_counter() - self._start
        rate = self._steps * samples_per_step / elapsed
        values = {f"{unit[0]}_per_s": rate * unit[1], "data_wait": self._waited / elapsed}
        if peak is not None:
            values["mfu"] = rate * flops_per_sample / peak
        self.__init__()
        return values
