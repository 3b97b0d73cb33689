"""The exports in transformers 4, in an environment of its own: version 5 stands in ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfsup.checkpoint import load_objective
from selfsup.data.tokenizer import load_tokenizer
from selfsup.export.huggingface import export_hf
from selfsup.export.huggingface_mae import export_hf_mae
from selfsup.export.huggingface_text import export_hf_text
from selfsup.export.timm import export_timm
from selfsup.objectives.mae import mae_loss, patchify
from selfsup.text.load import batch_of

SCRIPT = Path(__file__).parent / "in_transformers_4.py"


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> dict[str, str]:
    """Environment variables under which Python finds transformers 4 before our own."""
    folder = tmp_path_factory.mktemp("transformers-4")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
    ]
    command += ["--target", str(folder), "transformers>=4.57,<5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if (
        done.returncode and "No matching distribution found" in done.stderr
    ):  # also what pip says without network
        pytest.skip(f"pip finds no transformers 4 here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def make_work(run: Path, folder: Path) -> Path:
    """Three exports of a run, and inputs, for the script."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    inputs = {
        "images": torch.randn(3, 3, 16, 16, generator=generator),
        "noise": torch.stack([torch.randperm(16, generator=generator).float() for _ in range(3)]),
        "pixels": torch.from_numpy(pixels),
    }
    save_file(inputs, folder / "inputs.safetensors")
    export_hf(run, folder / "hf")
    export_hf_mae(run, folder / "hf-mae")
    export_timm(run, folder / "timm")
    return folder


def with_names_of_version_5(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    weights = load_file(path)
    for old, new in {"encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj"}.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    save_file(weights, path, {"format": "pt"})


def expect_our_outputs(run: Path, folder: Path) -> None:
    inputs, found = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    model, *_ = load_objective(run)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        name, images = str(dtype).removeprefix("torch."), inputs["images"].to(dtype)
        with torch.inference_mode():
            tokens = model.to(dtype).encoder.forward_features(images)
            pred, mask = model.predict(images, inputs["noise"])
            loss = mae_loss(pred, patchify(images, 4), mask, True).mean()
        for key, ours in (("hf", tokens), ("timm", tokens), ("prediction", pred), ("loss", loss)):
            theirs = found[f"{key}.{name}"]
            assert theirs.dtype == dtype
            assert (theirs - ours).abs().max() <= tolerance * max(1.0, float(ours.abs().max())), (key, name)
        assert torch.equal(found["mask"], mask)
    scaled = (inputs["pixels"] / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])
    for name in ("hf", "hf-mae"):
        assert (found[f"pixels.{name}"][0] - scaled.permute(2, 0, 1)).abs().max() <= 1e-5


@pytest.mark.slow
def test_exports_give_our_outputs_in_version_4(make_run, tmp_path, transformers_4):
    """And the trap that names written by hand avoid is seen: of version 5's names version 4 takes none."""
    variants = {"vit": {}, "no-bias": {"encoder": {"qkv_bias": False, "mlp_ratio": 3.5}}}
    runs = {name: make_run(changes, name) for name, changes in variants.items()}
    work = {name: make_work(run, tmp_path / f"work-{name}") for name, run in runs.items()}
    trap = make_work(runs["vit"], tmp_path / "trap")
    with_names_of_version_5(trap)
    command = [sys.executable, str(SCRIPT), *map(str, [*work.values(), trap])]
    done = subprocess.run(command, env=transformers_4, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    version, *lines = done.stdout.splitlines()
    assert version.startswith("4.")
    assert lines[:2] == ["work-vit", "work-no-bias"]
    for name, run in runs.items():
        expect_our_outputs(run, work[name])
    assert lines[2].startswith("trap ") and "encoder.layer.0.attention.attention.query.weight" in lines[2]


UNTIED = {"objective": {"tied": False}}
PAIRS = {"objective": {"next_sentence": True}, "data": {"packing": "pairs"}}
TEXT_RUNS = {
    "bert": ("bert", {}),
    "bert-pairs": ("bert", PAIRS),
    "bert-untied": (
        "bert",
        {**UNTIED, "encoder": {"token_types": 0, "bias": False, "activation": "gelu_tanh"}},
    ),
    "megatron": ("megatron", {}),
    "megatron-untied": ("megatron", UNTIED),
    "modernbert": ("modernbert", {"encoder": {"rope_base": 160000.0}}),
    "modernbert-untied": ("modernbert", {**UNTIED, "encoder": {"bias": True}}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {**UNTIED, "encoder": {"bias": False}}),
    "llama": ("llama", {"encoder": {"rope_base": 5e5}}),
    "llama-untied": ("llama", {**UNTIED, "encoder": {"bias": True}}),
}
EXAMPLES = ["The fox, twice!", "It isn't  over:\n 3.14", "a [MASK] b", ""]


@pytest.mark.slow
def test_text_exports_give_our_outputs_in_version_4(make_text_run, tmp_path, transformers_4):
    runs, work = {}, {}
    for name, (form, changes) in TEXT_RUNS.items():
        runs[name], work[name] = make_text_run(form, changes, name=name), tmp_path / f"work-{name}"
        export_hf_text(runs[name], work[name] / "hf")
        tokens = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens}, work[name] / "inputs.safetensors")
        (work[name] / "texts.json").write_text(json.dumps(EXAMPLES))
    command = [sys.executable, str(SCRIPT), *map(str, work.values())]
    done = subprocess.run(command, env=transformers_4, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    version, *lines = done.stdout.splitlines()
    assert version.startswith("4.") and lines == [f"work-{name}" for name in TEXT_RUNS]
    for name, run in runs.items():
        found, model = load_file(work[name] / "outputs.safetensors"), load_objective(run)[0]
        for dtype in (torch.float32, torch.float64):
            batch = batch_of(load_file(work[name] / "inputs.safetensors")["tokens"])
            with torch.inference_mode():
                model = model.to(dtype)
                causal = not hasattr(model, "head")
                logits = model.logits(model.encoder.encode(batch) if causal else batch).view(2, 40, -1)
            theirs = found[f"logits.{str(dtype).removeprefix('torch.')}"]
            # Its Llama narrows to float32 in its norms, and both work out their angles in float32.
            narrows = name.startswith(("llama", "modernbert"))
            tolerance = 1e-5 if dtype == torch.float32 or narrows else 1e-10
            assert theirs.dtype == dtype
            assert (theirs - logits).abs().max() <= tolerance * max(1.0, float(logits.abs().max())), (
                name,
                dtype,
            )
        assert bool(found["tied"]) == model.config.tied
        tokenizer = load_tokenizer(run)
        head, tail = ([], []) if causal else ([tokenizer.cls], [tokenizer.sep])
        ids = [[*head, *tokenizer.encode_prompt(text).tolist(), *tail] for text in EXAMPLES]
        assert found["ids"].tolist() == sum(ids, [])
        known = [tokenizer.decode([i for i in row if i != tokenizer.unk]) for row in ids]
        assert json.loads((work[name] / "decoded.json").read_text()) == known
