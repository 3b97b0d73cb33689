"""The cost of a run: counters that wrap, are missing or are counted twice; parts added up; what a kill leaves."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from ranks import on_ranks
from selfsup import cost, energy
from selfsup.cost import CostMeter, Part, total
from selfsup.energy import open_nvml, open_rapl

CPU = torch.device("cpu")


RANGE = 262_143_328_850  # microjoules, as on a real machine


def package(powercap, zone, name, joules, wraps_at=RANGE):
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    return folder / "energy_uj"


def machine(folder):
    """Two packages; the first one's cores and its memory-mapped twin, which are counted already; the whole platform."""
    powercap = folder / "powercap"
    (powercap / "intel-rapl").mkdir(parents=True)  # the control type: no name, no counter
    counters = {
        "first": package(powercap, "intel-rapl:0", "package-0", 1000),
        "cores": package(powercap, "intel-rapl:0:0", "core", 600),
        "second": package(powercap, "intel-rapl:1", "package-1", 50),
        "platform": package(powercap, "intel-rapl:2", "psys", 5000),
        "twin": package(powercap, "intel-rapl-mmio:0", "package-0", 1000),
    }
    return powercap, counters


def advance(counter, joules, wraps_at=RANGE):
    """As the hardware does it: modulo its range, and never half-written."""
    fresh = counter.with_name("fresh")
    fresh.write_text(str((int(counter.read_text()) + round(joules * 1e6)) % wraps_at))
    fresh.replace(counter)


def test_packages_are_counted_once(tmp_path):
    powercap, counters = machine(tmp_path)
    rapl = open_rapl(powercap)
    assert rapl.read() == 0
    for name, joules in {"first": 30, "twin": 30, "cores": 20, "second": 7, "platform": 90}.items():
        advance(counters[name], joules)
    assert rapl.read() == 37 and rapl.read() == 37


def wrapped_readings(tmp_path):
    """100 readings of 10 kJ each: a counter that wraps three times on its way to 1 MJ."""
    powercap, counters = machine(tmp_path)
    rapl = open_rapl(powercap)
    for _ in range(100):
        advance(counters["first"], 10_000)
        joules = rapl.read()
    return joules


def test_a_counter_that_wraps(tmp_path):
    assert wrapped_readings(tmp_path) == pytest.approx(1e6, rel=1e-9)


@pytest.mark.parametrize(
    "bug",
    [
        lambda before, after, wraps_at: after - before,  # wrap-around ignored
        lambda before, after, wraps_at: max(0, after - before),
        lambda before, after, wraps_at: (after - before) % 2**32,
    ],
    ids=["ignored", "dropped", "32 bits"],
)
def test_a_planted_wrap_is_caught(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(energy, "spent", bug)
    assert wrapped_readings(tmp_path) != pytest.approx(1e6, rel=1e-3)


def test_the_thread_keeps_up_with_a_counter_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.001)
    powercap, counters = machine(tmp_path)
    rapl = open_rapl(powercap)
    for _ in range(4):  # twice round, and nobody asks
        advance(counters["second"], 140_000)
        wanted = int(counters["second"].read_text())
        deadline = time.monotonic() + 20
        while rapl._last[1] != wanted and time.monotonic() < deadline:
            time.sleep(0.001)
    assert rapl.read() == pytest.approx(560_000)


@pytest.mark.parametrize("fault", ["no folder", "no package", "not readable", "no number"])
def test_what_cannot_be_read_is_unknown(tmp_path, fault):
    powercap, counters = tmp_path / "powercap", {}
    if fault == "no package":
        package(powercap, "intel-rapl:0", "psys", 1)
    elif fault != "no folder":
        powercap, counters = machine(tmp_path)
        counters["first"].unlink()
    if fault == "not readable":
        counters["first"].mkdir()  # to root every file is readable
    if fault == "no number":
        counters["first"].write_text("")
    assert open_rapl(powercap) is None


def test_a_counter_that_vanishes_is_unknown_for_good(tmp_path):
    powercap, counters = machine(tmp_path)
    rapl = open_rapl(powercap)
    held = counters["first"].read_text()
    counters["first"].unlink()
    assert rapl.read() is None
    counters["first"].write_text(held)
    assert rapl.read() is None  # what it did meanwhile is not known


class NVMLError(Exception):
    pass


def fake_nvml(uuid, millijoules):
    """A driver that knows one GPU, by UUID; `millijoules`: its counter at each reading, an error for None."""
    readings = iter(millijoules)

    def by_uuid(asked):
        if asked != uuid:
            raise NVMLError(asked)
        return "handle"

    def energy_of(handle):
        assert handle == "handle"
        value = next(readings)
        if value is None:
            raise NVMLError("not supported")
        return value

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=energy_of,
    )


def test_a_gpu_is_read_in_joules():
    nvml = fake_nvml("GPU-12-ab", [5_000_000, 5_250_500, None])
    gpu = open_nvml("12-ab", nvml)
    assert gpu.read() == 250.5
    assert gpu.read() is None
    assert open_nvml("GPU-other", nvml) is None
    assert open_nvml("12-ab", fake_nvml("GPU-12-ab", [None])) is None  # before Volta


def test_the_real_library_without_a_driver_is_unknown():
    import pynvml  # what open_nvml asks for

    for name in ("NVMLError", "nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        assert hasattr(pynvml, name)
    assert open_nvml("00000000-0000-0000-0000-000000000000") is None


PART = Part(
    started=0.0, seconds=1800.0, first_step=0, step=10, samples=100, processes=4, machines=1, device="H100",
    flops=1e15, peak=1e12, gpu_joules=1.8e6, cpu_joules=None,
)  # fmt: skip


def part(**changes):
    return Part(**{**PART.__dict__, **changes})


def test_parts_add_up():
    """By hand: half an hour on 4 devices, then an hour on 2."""
    cost = total(
        [PART, part(seconds=3600.0, processes=2, flops=3e15, gpu_joules=1.8e6, device="A100", samples=50)]
    )
    assert cost["wall_hours"] == 1.5 and cost["device_hours"] == 4 and cost["parts"] == 2
    assert cost["devices"] == {"H100": 2, "A100": 2} and cost["samples"] == 150
    assert cost["gpu_kwh"] == 1 and cost["cpu_kwh"] is None  # 3.6 MJ
    assert cost["flops"] == 4e15
    assert cost["mfu"] == pytest.approx(4e15 / (1e12 * (4 * 1800 + 2 * 3600)))


def test_what_a_part_does_not_know_the_whole_does_not():
    cost = total([PART, part(gpu_joules=None, peak=None)])
    assert cost["gpu_kwh"] is None and cost["mfu"] is None and cost["flops"] == 2e15
    assert total([])["device_hours"] == 0 and total([])["mfu"] is None


def test_words():
    assert cost.line(total([PART])) == (
        "cost       0.5 hours, 2 H100 hours; energy 0.5 kWh GPUs, CPUs unknown; 1e+15 FLOPs, MFU 13.9%"
    )
    nothing = total([part(gpu_joules=0.0, peak=None, device="cpu")])
    assert "energy unknown; " in cost.line(nothing) and cost.line(nothing).endswith("MFU unknown")
    both = total([part(cpu_joules=36e4), part(cpu_joules=36e4)])
    assert cost.energy_text(both) == "1 kWh GPUs, 0.2 kWh CPU packages" and " in 2 parts, " in cost.line(both)
    assert (
        cost.energy_text(total([part(gpu_joules=None, cpu_joules=0.0)])) == "0 kWh CPU packages, GPUs unknown"
    )


def test_a_run_that_is_killed_and_resumed(tmp_path):
    """Steps 11 to 14 are lost in the kill and done again: spent twice, except what came after the last record."""
    powercap, counters = machine(tmp_path)
    meter = CostMeter(tmp_path, 2, CPU, flops_per_sample=5.0, powercap=powercap)
    meter.record(0, 0)
    advance(counters["first"], 1000)
    meter.record(10, 160)
    advance(counters["first"], 200)
    meter.record(14, 224)
    advance(counters["first"], 999)  # then kill -9
    parts = json.loads((tmp_path / "cost.json").read_text())["parts"]
    assert [(p["first_step"], p["step"], p["samples"], p["cpu_joules"]) for p in parts] == [
        (0, 14, 224, 1200)
    ]

    resumed = CostMeter(tmp_path, 4, CPU, flops_per_sample=5.0, powercap=powercap)
    resumed.record(10, 160)
    advance(counters["second"], 50)
    resumed.record(20, 320)
    cost = resumed.summary()
    assert cost["samples"] == 224 + 160 and cost["flops"] == 5.0 * 384 and cost["parts"] == 2
    assert cost["cpu_kwh"] == pytest.approx(1250 / 3.6e6) and cost["gpu_kwh"] == 0
    first, second = json.loads((tmp_path / "cost.json").read_text())["parts"]
    assert first == parts[0] and (second["first_step"], second["processes"]) == (10, 4)
    assert cost["wall_hours"] * 3600 == pytest.approx(first["seconds"] + second["seconds"])
    assert cost["device_hours"] * 3600 == pytest.approx(2 * first["seconds"] + 4 * second["seconds"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cost.json", "powercap"]


def test_unknown_energy_stays_unknown(tmp_path):
    meter = CostMeter(tmp_path, 1, CPU, 1.0, powercap=tmp_path / "none")
    meter.record(0, 0)
    assert meter.reading() == (0.0, None) and meter.summary()["cpu_kwh"] is None


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": [{"seconds": 1}]}', '{"parts": 3}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "cost.json").write_text(content)
    with pytest.raises(ValueError, match="cost.json: damaged: .* move it away"):
        CostMeter(tmp_path, 1, CPU, 1.0)


@pytest.mark.parametrize("machines", [1, 2])
def test_each_machine_is_counted_once(tmp_path, machines):
    """Four ranks on one machine, or two on each of two: rank 0 writes, the packages of a machine count once."""
    powercap, counters = machine(tmp_path)

    def rank():
        number = torch.distributed.get_rank()
        os.environ["LOCAL_RANK"] = str(number % (4 // machines))
        meter = CostMeter(tmp_path, 4, CPU, 1.0, powercap=powercap)
        meter.record(0, 0)
        torch.distributed.barrier()
        if number == 0:
            advance(counters["first"], 100)
        torch.distributed.barrier()
        meter.record(1, 8)
        return meter.summary()

    summaries = on_ranks(4, rank, tmp_path)
    assert summaries[0]["cpu_kwh"] == pytest.approx(machines * 100 / 3.6e6)
    (written,) = json.loads((tmp_path / "cost.json").read_text())["parts"]
    assert written["machines"] == machines and written["processes"] == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu(tmp_path):
    """Half a second of matrix products takes between 5 and 1000 W, where the device has a counter."""
    meter = CostMeter(tmp_path, 1, torch.device("cuda", 0), 1.0)
    began, x = time.perf_counter(), torch.randn(4096, 4096, device="cuda")
    while time.perf_counter() - began < 0.5:
        x = (x @ x).clamp(-1, 1)
        torch.cuda.synchronize()
    gpu = meter.reading().gpu
    if gpu is None:
        pytest.skip("this device has no energy counter")
    assert 5 < gpu / (time.perf_counter() - began) < 1000
