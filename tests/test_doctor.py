"""The doctor sees planted faults, says what to do, and finds nothing on a good machine."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data.making import write_shards
from selfsup import cli
from selfsup.data.index import build_index, save_index
from selfsup.doctor import command, libraries, machine, storage
from selfsup.doctor.finding import Finding

RATE = machine.product_rate
"""The real one: the tests below put numbers in its place."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No variable of the machine that runs the tests, and a short measurement."""
    for name in [n for n in machine.os.environ if n.startswith("ACCELERATE_") or n in machine.HARMFUL]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    rates = {"torch.float32": 100.0, "torch.bfloat16": 300.0}
    monkeypatch.setattr(machine, "product_rate", lambda dtype, size, device: rates[str(dtype)])


@pytest.fixture
def shards(tmp_path):
    folder = write_shards(tmp_path / "shards", [7, 5])
    save_index(build_index(folder, 1))
    return folder


def doctor(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["selfsup", "doctor", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr().out


def worst(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state != "ok"]


def test_a_good_machine(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "_WANTED", 0)  # disks of test machines are full, their memory is small
    monkeypatch.setattr(storage, "_NEEDED", 0)
    monkeypatch.setattr(machine, "GIB", 1)
    code, out = doctor(
        monkeypatch, capsys, "--run-dir", tmp_path / "runs" / "new", "--shards", shards, "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["ok"] and [f for f in report["findings"] if f["state"] == "problem"] == []
    said = {finding["check"]: finding["text"] for finding in report["findings"]}
    expected = "python versions imports simplejpeg cpu cuda precision threads memory environment shards"
    assert set(expected.split()) | {"shared memory", "run folder", "file lock", "disk"} == set(said)
    assert said["precision"].endswith("fp32 100, bf16 300 GFLOP/s; train with precision.mixed: bf16")
    assert "12 images in 2 shards as indexed" in said["shards"]
    assert f"torch {importlib.metadata.version('torch')}," in said["versions"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards"]  # it left nothing behind


def test_text_says_what_to_do(tmp_path, monkeypatch, capsys):
    code, out = doctor(monkeypatch, capsys, "--run-dir", tmp_path, "--shards", tmp_path / "[red]absent")
    assert code == 2
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("problem  shards: "))
    assert "[red]absent" in lines[at]  # not taken for markup
    assert lines[at + 1].strip() == "-> name a folder of WebDataset shards"
    assert lines[-1].endswith("1 problem")


def test_text_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    command.show([Finding("a", "warning", "b", "c"), Finding("d", "ok", "e")])
    assert capsys.readouterr().out.splitlines() == [
        "warning  a: b", "         -> c", "ok       d: e", "1 ok, 1 warning, 0 problem",
    ]  # fmt: skip


def test_shards_without_an_index(tmp_path):
    (finding,) = storage.check_shards_folder(str(write_shards(tmp_path / "s", [3])))
    assert finding.state == "problem" and "selfsup data index" in finding.text + finding.fix


def test_a_truncated_and_an_altered_shard(shards):
    (shards / "part-001.tar").write_bytes((shards / "part-001.tar").read_bytes()[:-512])
    (finding,) = storage.check_shards_folder(str(shards))
    assert finding.state == "problem" and "part-001.tar: truncated or altered" in finding.text
    assert "restore it" in finding.fix and "selfsup data index" in finding.fix


def test_a_shard_altered_at_the_same_size(shards):
    content = bytearray((shards / "part-000.tar").read_bytes())
    content[600] ^= 1
    (shards / "part-000.tar").write_bytes(content)
    (finding,) = storage.check_shards_folder(str(shards))
    assert finding.state == "problem" and "altered since indexed: part-000.tar" in finding.text
    assert finding.fix.startswith("restore")


def test_a_shard_the_index_does_not_know(shards):
    (shards / "part-002.tar").write_bytes((shards / "part-000.tar").read_bytes())
    (finding,) = storage.check_shards_folder(str(shards))
    assert finding.state == "problem" and "not in the index" in finding.text and "add with" in finding.fix


def test_what_an_index_left_out_is_said(tmp_path):
    folder = write_shards(tmp_path / "s", [3])
    index = build_index(folder, 1)
    index.skipped["images that could not be decoded"] = 2
    save_index(index)
    ok, left_out = storage.check_shards_folder(str(folder))
    assert ok.state == "ok" and left_out.state == "warning" and "2 images that could not" in left_out.text


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        (finding,) = storage.check_run_folder(run_dir)
        assert finding.state == "problem" and "is a file" in finding.text and "--run.dir" in finding.fix


def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(
            13, "Permission denied"
        )  # root, who runs tests in containers, may write anywhere

    monkeypatch.setattr(storage.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(storage, "_NEEDED", 0)
    finding, _ = storage.check_run_folder(tmp_path / "run")
    assert finding.state == "problem" and "Permission denied" in finding.text
    assert f"make {tmp_path} writable" in finding.fix


def test_locks(tmp_path, monkeypatch):
    assert storage.try_locking(tmp_path / "a", tmp_path).state == "ok"

    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", lambda *_: None)  # a file system that grants every lock
        finding = storage.try_locking(tmp_path / "b", tmp_path)
        assert finding.state == "problem" and "did not see the lock" in finding.text
        patch.setattr(fcntl, "lockf", no_locks)
        finding = storage.try_locking(tmp_path / "c", tmp_path)
        assert finding.state == "problem" and "No locks available" in finding.text
    assert "local disk" in finding.fix


@pytest.mark.parametrize("free,state", [(100, "ok"), (5, "warning"), (0.5, "problem")])
def test_disk(tmp_path, free, state):
    finding = storage.disk_finding(int(free * 2**30), tmp_path)
    assert finding.state == state and (state == "ok" or "make room" in finding.fix)


def fake_metadata(monkeypatch, versions: dict[str, str | None], requires: dict[str, list[str]] | None = None):
    """Installed versions (None: not installed) and requirements as package metadata would say."""
    real_version, real_requires = importlib.metadata.version, importlib.metadata.requires

    def version(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: (requires or {}).get(name) or real_requires(name)
    )


def test_versions_too_low_and_missing(monkeypatch):
    asked = [
        "timm>=1.0.20", "einops>=0.8", "torch>=2.11", 'transformers>=4.57; extra == "hf"',
        'ghost>=1; extra == "hf"', 'winonly>=3; sys_platform == "win32"',
    ]  # fmt: skip
    versions = {"timm": "0.9.2", "einops": None, "torch": "2.11.0+cpu", "transformers": "4.1", "ghost": None}
    fake_metadata(monkeypatch, versions, {"selfsup": asked})
    found = list(libraries.check_versions())
    assert [(f.state, f.fix) for f in worst(found)] == [
        ("problem", 'pip install "timm>=1.0.20"'),
        ("problem", 'pip install "einops>=0.8"'),
        ("warning", 'pip install "transformers>=4.57"'),
    ]
    assert "needed timm>=1.0.20, got 0.9.2" in found[1].text
    said = " ".join(f.text for f in found)
    assert (
        "torch 2.11.0+cpu" in said and "optional and not installed: ghost" in said and "winonly" not in said
    )


def test_python_too_old(monkeypatch):
    monkeypatch.setattr(libraries.platform, "python_version", lambda: "3.9.1")
    assert ("python", "problem") in [(f.check, f.state) for f in libraries.check_versions()]


def test_selfsup_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    (finding,) = libraries.check_versions()
    assert finding.state == "warning" and finding.fix == "pip install -e ."


def test_broken_imports_do_not_stop_it(monkeypatch):
    real = importlib.import_module

    def broken(name, *rest):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name == "webdataset":
            raise ModuleNotFoundError("No module named 'webdataset'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    found = worst(list(libraries.check_imports()))
    assert [f.text.split(":")[0] for f in found] == ["import torchvision fails", "import webdataset fails"]
    assert "from one index" in found[0].fix


def test_torchvision_of_another_torch(monkeypatch):
    fake_metadata(
        monkeypatch, {"torch": "2.15.0+cpu", "torchvision": "0.26.1"}, {"torchvision": ["torch==2.14.0"]}
    )
    found = worst(list(libraries.check_imports()))
    assert [f.text for f in found] == ["torchvision 0.26.1 was built for torch==2.14.0, got 2.15.0+cpu"]


def test_a_check_that_breaks_is_a_finding_and_the_rest_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setattr(machine, "product_rate", lambda *_: 1 / 0)
    found = {f.check: f for f in command.diagnose(tmp_path, None) if f.state == "problem"}
    assert "ModuleNotFoundError" in found["simplejpeg"].text or "ImportError" in found["simplejpeg"].text
    assert "ZeroDivisionError" in found["precision"].text
    assert found.keys() <= {"simplejpeg", "precision", "disk"}


def test_it_starts_where_the_libraries_are_broken(tmp_path):
    """In a fresh process in which torch, timm and all the rest cannot be imported."""
    names = [
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "jaxtyping",
        "pydantic",
        "rich",
        "simplejpeg",
        "packaging",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "from pathlib import Path; from selfsup.doctor.command import main_doctor\n"
        f"sys.exit(main_doctor(Path({str(tmp_path)!r}), {str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == ""
    for check in ("versions", "imports", "simplejpeg", "devices", "precision", "shards"):
        assert f"problem  {check}: " in done.stdout
    assert "ok       file lock: " in done.stdout


def test_simplejpeg_that_reads_back_another_image(monkeypatch):
    import simplejpeg

    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: real(data) ^ 64)
    (finding,) = libraries.check_simplejpeg()
    assert finding.state == "problem" and "--force-reinstall simplejpeg" in finding.fix


@pytest.mark.parametrize(
    "omp,cores,quota,load,text",
    [
        ("4", 4, None, 0.1, None),
        (None, 4, None, 3.9, None),
        ("8", 4, None, 0.1, "8 threads on 4 usable cores"),
        (None, 16, 2.5, 0.1, "16 threads on 2 usable cores"),
        ("many", 4, None, 0.1, "expected a whole number, got 'many'"),
        ("1", 2, None, 2.5, "the machine is busy: load 2.5 on 2 cores"),
    ],
)
def test_threads(omp, cores, quota, load, text):
    found = worst(list(machine.thread_findings(omp, cores, quota, load)))
    assert [f.state for f in found] == ([] if text is None else ["warning"])
    assert text is None or (text in found[0].text and "--run.threads" in found[0].fix)


def test_container_limit():
    assert machine.cpu_quota("max 100000\n") is None and machine.cpu_quota(None) is None
    assert machine.cpu_quota("250000 100000\n") == 2.5


def test_memory():
    assert [machine.memory_finding(n).state for n in (8 * 2**30, 2**30, None)] == ["ok", "warning", "ok"]
    assert [machine.shared_memory_finding(n).state for n in (8 * 2**30, 64 * 2**20)] == ["ok", "warning"]
    assert "--shm-size" in machine.shared_memory_finding(64 * 2**20).fix


def test_environment():
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2", "PYTHONOPTIMIZE": "", "HOME": "/",
    }  # fmt: skip
    found = list(machine.environment_findings(variables))
    assert [(f.state, f.fix) for f in found] == [
        ("problem", "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        ("warning", "unset ACCELERATE_MIXED_PRECISION"),
        ("problem", "unset ACCELERATE_USE_DEEPSPEED"),
        ("warning", "unset ACCELERATE_USE_FSDP"),
        ("warning", "unset WORLD_SIZE"),
    ]
    assert [f.state for f in machine.environment_findings({"HOME": "/", "WORLD_SIZE": "1"})] == ["ok"]


def test_cpu_facts():
    text = "processor\t: 0\nmodel name\t: A Chip @ 2 GHz\nflags\t\t: fpu amx_bf16 avx512_bf16\n\nprocessor\t: 1\n"
    assert machine.cpu_facts(text) == ("A Chip @ 2 GHz", {"fpu", "amx_bf16", "avx512_bf16"})
    assert machine.cpu_facts(None) == ("unknown CPU", set())


def test_cuda_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (2**30, 16 * 2**30))
    kinds = [SimpleNamespace(name="old", major=7, minor=5), SimpleNamespace(name="new", major=9, minor=0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: kinds[i])
    _, old, new = machine.check_devices()
    assert (old.state, old.fix) == ("warning", "use precision.mixed: fp16")
    assert new.state == "ok" and new.text == "new, 1 of 16 GiB free, capability 9.0, bf16"


@pytest.mark.parametrize(
    "cuda,bf16,fp16,best",
    [(False, 300, 0, "bf16"), (False, 110, 0, "fp32"), (True, 50, 800, "fp16"), (True, 700, 800, "bf16")],
)
def test_precision_to_train_in(monkeypatch, cuda, bf16, fp16, best):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rates = {torch.float32: 100.0, torch.bfloat16: float(bf16), torch.float16: float(fp16)}
    monkeypatch.setattr(machine, "product_rate", lambda dtype, size, device: rates[dtype])
    (finding,) = machine.check_precision()
    assert finding.text.endswith(f"precision.mixed: {best}") and ("fp16 800" in finding.text) == cuda


def test_rate_is_measured_and_settings_are_put_back():
    import torch

    torch.set_float32_matmul_precision("medium")
    assert 0.01 < RATE(torch.float32, 64, "cpu", seconds=0.01) < 1e5
    list(machine.check_precision())
    assert torch.get_float32_matmul_precision() == "medium" and torch.get_num_threads() == 1
