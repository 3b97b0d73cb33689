"""What a run cost: hours of devices, energy, FLOPs, and MFU, summed over interruptions, in RUN/cost.json."""

import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from selfsup import dist
from selfsup.durable import write_atomically
from selfsup.energy import POWERCAP, Energy, EnergyMeter

COST_FILE = "cost.json"


@dataclass(frozen=True)
class Part:
    """One stretch of a run, from a start or resume to its last record."""

    started: float
    """Unix time."""
    seconds: float
    """Wall time."""
    first_step: int
    step: int
    samples: int
    """Through the model in this part. What a killed run did beyond its checkpoint is done again by the next
    part, and counts twice: it was spent twice."""
    processes: int
    machines: int
    device: str
    """What each process ran on."""
    flops: float
    peak: float | None
    """FLOP/s of one device at the run's precision; None where unknown."""
    gpu_joules: float | None
    """Of all GPUs used; 0 where none is, None where a counter is missing."""
    cpu_joules: float | None
    """Of the packages of all machines, whoever used them; None where a counter is missing or not readable."""

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.processes


def total(parts: list[Part]) -> dict[str, Any]:
    """The cost of all parts together, as JSON values; None where a part does not know.

    wall_hours; device_hours, and by device in devices; gpu_kwh, cpu_kwh; samples; flops; mfu (FLOPs over what
    the devices could have done in that time); parts.
    """
    devices: dict[str, float] = {}
    for part in parts:
        devices[part.device] = devices.get(part.device, 0.0) + part.device_seconds / 3600
    flops = sum(part.flops for part in parts)
    able = _sum(None if part.peak is None else part.peak * part.device_seconds for part in parts)
    gpu, cpu = _sum(part.gpu_joules for part in parts), _sum(part.cpu_joules for part in parts)
    return {
        "wall_hours": sum(part.seconds for part in parts) / 3600,
        "device_hours": sum(devices.values()),
        "devices": devices,
        "gpu_kwh": None if gpu is None else gpu / 3.6e6,
        "cpu_kwh": None if cpu is None else cpu / 3.6e6,
        "samples": sum(part.samples for part in parts),
        "flops": flops,
        "mfu": flops / able if able else None,
        "parts": len(parts),
    }


def _sum(values: Any) -> float | None:
    """None where one of them is."""
    found = list(values)
    return None if None in found else float(sum(found))


def read_parts(path: Path) -> list[Part]:
    """The parts in a cost.json; none where there is no such file. Raises ValueError for a damaged one."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())["parts"]
        return [Part(**{field.name: part[field.name] for field in fields(Part)}) for part in content]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged: expected the parts of a run, got {error!r}; move it away"
        ) from None


def energy_text(cost: dict[str, Any]) -> str:
    """The energy of a `total` for people."""
    gpu, cpu = cost["gpu_kwh"], cost["cpu_kwh"]
    known = [f"{gpu:.3g} kWh GPUs"] if gpu else []
    known += [] if cpu is None else [f"{cpu:.3g} kWh CPU packages"]
    unknown = ["GPUs unknown"] if gpu is None else []
    unknown += ["CPUs unknown"] if cpu is None else []
    return ", ".join([*known, *unknown]) if known else "unknown"


def line(cost: dict[str, Any]) -> str:
    """A `total` in one line."""
    devices = ", ".join(f"{hours:.4g} {name} hours" for name, hours in cost["devices"].items())
    mfu = "unknown" if cost["mfu"] is None else f"{100 * cost['mfu']:.1f}%"
    parts = "" if cost["parts"] == 1 else f" in {cost['parts']} parts"
    return (
        f"cost       {cost['wall_hours']:.4g} hours{parts}, {devices}; energy {energy_text(cost)}; "
        f"{cost['flops']:.3g} FLOPs, MFU {mfu}"
    )


class CostMeter:
    """Counts from its making on. Made, and asked to `record`, on every rank: both are collectives.

    run_dir: the run folder, claimed; earlier parts in its cost.json are kept and added to. processes: of the
    run, one device each. peak: FLOP/s of one device (flops.peak). Raises ValueError for a damaged cost.json.
    """

    def __init__(
        self,
        run_dir: Path,
        processes: int,
        device: torch.device,
        flops_per_sample: float,
        peak: float | None = None,
        powercap: Path = POWERCAP,
    ):
        first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
        self._path, self._flops_per_sample = run_dir / COST_FILE, flops_per_sample
        self._earlier = dist.on_first_rank(read_parts, self._path) or []
        self._machines = round(dist.sum_over_ranks(float(first_of_machine))[0])
        self._processes, self._peak = processes, peak
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._energy = EnergyMeter(device, first_of_machine, powercap)
        self._started, self._clock = time.time(), time.perf_counter()
        self._start: tuple[int, int] | None = None
        self._part: Part | None = None

    def reading(self) -> Energy:
        """Joules that this process reads since the meter was made; no collective."""
        return self._energy.read()

    def record(self, step: int, samples: int) -> None:
        """Steps and samples of the whole run so far, those of earlier parts included: before the first step of
        this part, with each checkpoint, and at the end. Rank 0 writes cost.json.

        A collective. Raises OSError on every rank (ValueError on the others) where it cannot be written.
        """
        first_step, first_sample = self._start = self._start or (step, samples)
        found = self.reading()
        sums = dist.sum_over_ranks(
            *(value or 0.0 for value in found), *(float(value is None) for value in found)
        )
        gpu, cpu = (joules if not missing else None for joules, missing in zip(sums[:2], sums[2:]))
        self._part = Part(
            started=self._started,
            seconds=time.perf_counter() - self._clock,
            first_step=first_step,
            step=step,
            samples=samples - first_sample,
            processes=self._processes,
            machines=self._machines,
            device=self._device,
            flops=self._flops_per_sample * (samples - first_sample),
            peak=self._peak,
            gpu_joules=gpu,
            cpu_joules=cpu,
        )
        dist.on_first_rank(self._write)

    def summary(self) -> dict[str, Any]:
        """The `total` of the run up to the last `record`; on ranks other than 0 without the earlier parts."""
        return total(self._parts())

    def _parts(self) -> list[Part]:
        return [*self._earlier, *([] if self._part is None else [self._part])]

    def _write(self) -> None:
        content = {"parts": [asdict(part) for part in self._parts()]}
        write_atomically(self._path, json.dumps(content, indent=1).encode())
