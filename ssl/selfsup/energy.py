"""Energy in joules, where the hardware counts it: GPUs by NVML, CPU packages by RAPL. Never an estimate."""

import importlib
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 60.0
"""RAPL's counters wrap after some 260 kJ: 22 minutes at 200 W, four at 1 kW. They are read this often."""


class Energy(NamedTuple):
    """Joules; None where no counter tells."""

    gpu: float | None
    """Of GPUs; 0 where none is used."""
    cpu: float | None
    """Of CPU packages: of all that ran on the machine, DRAM and the rest of it not included."""


def spent(before: int, after: int, wraps_at: int) -> int:
    """What a counter advanced from one reading to the next; one that fell has begun again at 0 past `wraps_at`."""
    return after - before if after >= before else after + wraps_at - before


class Rapl:
    """Joules that this machine's CPU packages used since `open_rapl`; a thread keeps up with the counters."""

    def __init__(self, zones: list[Path]):
        """zones: folders with energy_uj and max_energy_range_uj, in microjoules. Raises OSError, ValueError."""
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones]
        self._last = [_number(counter) for counter, _ in self._zones]
        self._total, self._lock, self._closed = 0, threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_up, name="rapl", daemon=True).start()

    def read(self) -> float | None:
        """Joules so far; None once a counter could not be read."""
        with self._lock:
            try:
                now = [_number(counter) for counter, _ in self._zones]
            except (OSError, ValueError):
                self._closed.set()
            if self._closed.is_set():
                return None
            steps = zip(self._last, now, (wraps_at for _, wraps_at in self._zones), strict=True)
            self._total += sum(spent(*step) for step in steps)
            self._last = now
            return self._total / 1e6

    def _keep_up(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            self.read()


def _number(path: Path) -> int:
    return int(path.read_text())


def open_rapl(powercap: Path = POWERCAP) -> Rapl | None:
    """The counters of all CPU packages of this machine; None where there are none or they are root's alone.

    A package may stand there twice (intel-rapl and intel-rapl-mmio): it is counted once, by its name.
    """
    try:
        zones = {(zone / "name").read_text().strip(): zone for zone in sorted(powercap.glob("*rapl*:*"))}
        packages = [zone for name, zone in sorted(zones.items()) if name.startswith("package")]
        return Rapl(packages) if packages else None
    except (OSError, ValueError):
        return None


class Nvml:
    """Joules that one GPU used since `open_nvml`, by its own counter."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle
        self._start = self._millijoules()

    def read(self) -> float | None:
        """Joules so far; None where the driver no longer answers."""
        try:
            return (self._millijoules() - self._start) / 1e3
        except self._nvml.NVMLError:
            return None

    def _millijoules(self) -> int:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)


def open_nvml(uuid: str, nvml: ModuleType | Any | None = None) -> Nvml | None:
    """The energy counter of the GPU with this UUID (with or without `GPU-`); None where there is none: before
    Volta, on a MIG slice, without driver or nvidia-ml-py.

    By UUID, because NVML numbers all GPUs of a machine and CUDA only those that it may see.
    """
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return Nvml(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}"))
    except nvml.NVMLError:
        return None


class EnergyMeter:
    """This process's part of what a run uses: its GPU and, of one process a machine, the CPU packages."""

    def __init__(self, device: torch.device, first_of_machine: bool, powercap: Path = POWERCAP):
        self._cuda, self._first = device.type == "cuda", first_of_machine
        uuid = str(torch.cuda.get_device_properties(device).uuid) if self._cuda else ""
        self._nvml = open_nvml(uuid) if self._cuda else None
        self._rapl = open_rapl(powercap) if first_of_machine else None

    def read(self) -> Energy:
        """Joules since the meter was made. 0 for what another process reads, or is not there to be read."""
        gpu = 0.0 if not self._cuda else self._nvml.read() if self._nvml else None
        cpu = 0.0 if not self._first else self._rapl.read() if self._rapl else None
        return Energy(gpu, cpu)
