"""The rules of the house that a reader relies on and a change could break unseen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from selfsup.config import merge, validate
from selfsup.recipe import Recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssl" / "selfsup"

FLOORS = {
    "config": 0, "batch": 0, "dist": 0, "keyed": 0, "durable": 0, "memory": 0, "energy": 0,
    "pace": 1, "cost": 1, "runs": 2,
    "attention": 1, "data": 1,
    "layers": 2,
    "encoders": 3, "sharding": 3,
    "optim": 5, "lars": 4, "mup": 4, "schedule": 3, "metrics": 5, "flops": 0, "ema": 4, "profiling": 4,
    "objectives": 5,
    "recipe": 6,
    "checkpoint": 7, "saving": 8,
    "conformance": 9,
    "run_folder": 8, "export": 8, "text": 8,
    "probe": 9, "look": 9, "doctor": 9,
    "stop": 9, "watchdog": 9, "parallel": 9,
    "start": 10,
    "estimate": 11, "headroom": 12,
    "guard": 11, "opening": 11,
    "dry_run": 13,
    "train": 14,
    "carry_on": 15,
    "launch": 16, "scaling": 16,
    "cli": 17,
}  # fmt: skip
ONLY_IN = {
    "accelerate": {"start", "parallel", "opening", "train", "guard"},
    "webdataset": {"data"},
    "transformers": {"export"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, text: str) -> list[str]:
    """Every dotted name a file imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def area(path: Path) -> str:
    """`objectives/mae.py` -> objectives, `train.py` -> train."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path, names: list[str]) -> list[str]:
    here, wrong = area(path), []
    for name in names:
        top, *rest = name.split(".")
        if top in ONLY_IN and here not in ONLY_IN[top]:
            wrong.append(f"{path.name} imports {name}")
        if top == "selfsup" and rest[0] in FLOORS and rest[0] != here and FLOORS[rest[0]] >= FLOORS[here]:
            wrong.append(f"{path.name} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[rest[0]]})")
    return wrong


@pytest.mark.parametrize("path", [p for p in MODULES if area(p) != "__init__"], ids=lambda p: str(p.name))
def test_imports_go_down_only(path):
    assert area(path) in FLOORS, f"{path}: give it a floor"
    assert violations(path, imports(path, path.read_text())) == []


def test_a_planted_import_is_caught():
    assert violations(PACKAGE / "keyed.py", ["selfsup.train.main"])
    assert violations(PACKAGE / "layers" / "block.py", ["transformers"])
    assert violations(PACKAGE / "optim.py", ["selfsup.metrics.MetricsLog"])


def test_ssl_stays_the_standard_library():
    assert not (ROOT / "ssl" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import ssl; print(ssl.__file__); ssl.create_default_context()"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(ROOT) not in done.stdout and done.stdout.strip().endswith("ssl.py")


def test_sizes():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 330, f"{path} is over 330 lines"


def unpickles(path: Path, text: str) -> bool:
    """Any door to pickle: the modules, torch.load, Accelerate's state, NumPy's allow_pickle."""
    tree = ast.parse(text)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    modules = {name.split(".")[0] for name in imports(path, text)}
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    banned = {"save_state", "load_state", "register_for_checkpointing"} & names
    return bool(
        {"pickle", "cloudpickle", "dill", "joblib"} & modules or banned or "allow_pickle" in keywords
    ) or ("torch.load" in text)


def test_nothing_is_unpickled():
    for path in MODULES + sorted((ROOT / "tools").glob("*.py")):
        assert not unpickles(path, path.read_text()), path
    for bug in (
        "import pickle",
        "torch.load(x)",
        "np.load(x, allow_pickle=True)",
        "accelerator.load_state(x)",
    ):
        assert unpickles(Path("x.py"), bug), bug


def test_one_pickle_is_written():
    """The file that facebookresearch's scripts read; everything else is safetensors and JSON."""
    assert [p.name for p in MODULES if "torch.save" in p.read_text()] == ["facebook.py"]


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "sweeps"],  # of recipes, no recipes
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_configs_build_on_the_meta_device(path):
    text = path.read_text()
    assert text.startswith("#"), f"{path}: opens with its command"
    recipe = validate(Recipe, merge(yaml.safe_load(text), {}))
    with torch.device("meta"):
        objective = recipe.objective.build(recipe.encoder)
    assert sum(p.numel() for p in objective.parameters()) > 0
    assert objective.flops_per_sample() > 0
