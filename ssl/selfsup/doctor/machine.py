"""Devices, number formats, threads, memory and environment variables."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from selfsup.doctor.finding import Finding

GIB = 2**30
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"

HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": "every CUDA kernel waits for the one before: slow",
    "WORLD_SIZE": "set outside a launcher, training waits for processes that never come",
    "TORCH_LOGS": "torch writes debugging output",
    "PYTHONOPTIMIZE": "assertions are off, and with them checks on our own mistakes",
}
"""Variables and what they do, unless they are empty or 0."""

HARMLESS = {"WORLD_SIZE": ("", "1")}
"""Other values that do nothing."""

_STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_PLUGINS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def check_devices() -> Iterator[Finding]:
    """CUDA devices as torch sees them, and the CPU."""
    import torch

    model, flags = cpu_facts(_read("/proc/cpuinfo"))
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags] if flags else ["unknown"]
    text = f"{model}, {usable_cores()} of {os.cpu_count()} cores usable, bf16 instructions: {', '.join(fast) or 'none'}"
    yield Finding("cpu", "ok", text)
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = f"{about.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, capability {about.major}.{about.minor}"
        if about.major >= 8:
            yield Finding("cuda", "ok", f"{text}, bf16")
        else:
            yield Finding("cuda", "warning", f"{text}, no bf16 in hardware", "use precision.mixed: fp16")
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            why = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it"
            fix = "install a CUDA build of torch and torchvision (pytorch.org), or check nvidia-smi"
            yield Finding("cuda", "warning", f"an NVIDIA driver is loaded, but {why}", fix)
        else:
            yield Finding("cuda", "ok", "no CUDA device: runs go to the CPU")


def cpu_facts(cpuinfo: str | None) -> tuple[str, set[str]]:
    """Model name and flags from the text of /proc/cpuinfo; `unknown` and none elsewhere."""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo or "", re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo or "", re.MULTILINE)
    return (model[1] if model else "unknown CPU"), set(flags[1].split() if flags else ())


def check_precision() -> Iterator[Finding]:
    """The rate of matrix products by number format, one thread, and which format to train in."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    formats, device, size = {"fp32": torch.float32, "bf16": torch.bfloat16}, "cpu", 512
    if torch.cuda.is_available():
        formats, device, size = formats | {"fp16": torch.float16}, "cuda", 4096
    try:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        rates = {name: product_rate(dtype, size, device) for name, dtype in formats.items()}
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    # bf16 before fp16, which needs its loss scaled; either only where it is plainly faster.
    best = next((name for name in ("bf16", "fp16") if rates.get(name, 0) > 1.2 * rates["fp32"]), "fp32")
    where = "one thread" if device == "cpu" else torch.cuda.get_device_name()
    measured = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    text = f"{where}, matrix products: {measured} GFLOP/s; train with precision.mixed: {best}"
    yield Finding("precision", "ok", text)


def product_rate(dtype: object, size: int, device: str, seconds: float = 0.4) -> float:
    """GFLOP/s (1e9) of products of two (size, size) matrices: the best of several short rounds."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a = torch.arange(size**2, device=device).remainder(17).to(dtype).reshape(size, size)
    out = a @ a  # the first call is slower
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        torch.matmul(a, a, out=out)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads() -> Iterator[Finding]:
    """Torch's threads against the cores, a container's limit, and what else is running."""
    yield from thread_findings(
        os.environ.get("OMP_NUM_THREADS"),
        usable_cores(),
        cpu_quota(_read(CPU_QUOTA)),
        os.getloadavg()[0],
    )


def thread_findings(omp: str | None, cores: int, quota: float | None, load: float) -> Iterator[Finding]:
    """omp: OMP_NUM_THREADS as set; quota: CPUs that the container may use; load: waiting processes."""
    limit = cores if quota is None else max(1, min(cores, int(quota)))
    fix = f"export OMP_NUM_THREADS={limit}, or --run.threads {limit}; fewer with several processes"
    if omp is not None and not omp.isdecimal():
        yield Finding("threads", "warning", f"OMP_NUM_THREADS: expected a whole number, got {omp!r}", fix)
    elif int(omp or cores) > limit:
        text = f"{omp or cores} threads on {limit} usable cores get in each other's way"
        yield Finding("threads", "warning", text, fix)
    else:
        yield Finding("threads", "ok", f"OMP_NUM_THREADS {omp or 'not set'}, {limit} usable cores")
    if load > limit:
        text = f"the machine is busy: load {load:.1f} on {limit} cores"
        yield Finding("threads", "warning", text, "wait, or --run.threads 1: more would wait for one another")


def cpu_quota(text: str | None) -> float | None:
    """CPUs of a container's limit (cgroup 2, cpu.max: `quota period`); None without one."""
    quota, _, period = (text or "max").partition(" ")
    return None if quota.strip() == "max" else int(quota) / int(period)


def check_memory() -> Iterator[Finding]:
    """Main memory that is free, and the shared memory that loader workers hand batches over in."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo") or "", re.MULTILINE)
    yield memory_finding(None if available is None else int(available[1]) * 1024)
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        yield Finding("shared memory", "ok", "no /dev/shm on this system: unknown")
        return
    yield shared_memory_finding(shared.f_bavail * shared.f_frsize)


def memory_finding(available: int | None) -> Finding:
    """available: bytes, None where the system does not say."""
    if available is None:
        return Finding("memory", "ok", "free memory unknown on this system")
    text = f"{available / GIB:.1f} GiB available"
    if available >= 2 * GIB:
        return Finding("memory", "ok", text)
    return Finding("memory", "warning", text, "close other programs, or a smaller --run.micro-batch")


def shared_memory_finding(free: int) -> Finding:
    """free: bytes of /dev/shm."""
    text = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free >= GIB:
        return Finding("shared memory", "ok", text)
    fix = "start the container with --shm-size=8g (or --ipc=host), or train with --run.workers 0"
    return Finding("shared memory", "warning", f"{text}: loader workers may die of it", fix)


def check_environment() -> Iterator[Finding]:
    """Variables that would change a run behind the recipe's back."""
    yield from environment_findings(os.environ)


def environment_findings(variables: Mapping[str, str]) -> Iterator[Finding]:
    """One for each harmful variable, or that there is none."""
    found = []
    for name, value in sorted(variables.items()):
        shown, fix = f"{name}={value}", f"unset {name}"
        if name == _STEPS and value != "1":
            text = f"{shown}: training refuses it; --run.micro-batch says how a batch is cut"
            found.append(Finding("environment", "problem", text, fix))
        elif name in _PLUGINS and value.lower() == "true":
            text = f"{shown}: training fails, or refuses it on several processes"
            found.append(Finding("environment", "problem", text, fix))
        elif name.startswith("ACCELERATE_"):
            text = f"{shown}: it tells Accelerate what the recipe decides"
            found.append(Finding("environment", "warning", text, fix))
        elif name in HARMFUL and value not in HARMLESS.get(name, ("", "0")):
            found.append(Finding("environment", "warning", f"{shown}: {HARMFUL[name]}", fix))
    yield from found or [Finding("environment", "ok", "no variable that would hurt")]


def _read(path: str) -> str | None:
    """A file of the kernel's, or None where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return None
