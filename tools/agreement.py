"""How far a run on several processes is from one process: gradients in float64, losses in float32, and its speed.

    python tools/digits.py data/digits && selfsup data pack python-docs
    python tools/agreement.py [--objectives mae mlm] [--steps 20]

For each objective one process, then 2 and 4 under DDP and under FSDP2, by torchrun, the same global batch. Error:
the largest over all tensors of |difference| / |tensor|, of the gradients of the first step (out of Adam's first
moment) in float64; tensors whose gradient is nothing but rounding, as of a bias before a batch norm, over the
median norm. Loss: the largest relative difference over --steps steps, in float64 as well (in float32 rounding
grows as training goes on, by different layouts as by anything else). Speed: steps a second in float32, median
of the steps but the first two; with more processes than cores it says little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

LAYOUTS = [(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp2"), (4, "fsdp2")]
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
TEXT = {"max_length": 64, "embed_dim": 64, "depth": 4, "num_heads": 4}
IMAGES, TOKENS = {"shards": "data/digits/train"}, {"shards": "data/python-docs/train-tokens"}
GREY = {"mean": [0.3], "std": [0.38]}
HEADS = {"hidden_dim": 128, "out_dim": 32}
CONFIGS = {
    "mae": {
        "objective": {"name": "mae", "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 2},
        "encoder": {**VIT, "in_chans": 1},
        "data": {**IMAGES, **GREY},
    },
    "simclr": {"objective": {"name": "simclr", **HEADS}, "encoder": VIT, "data": {**IMAGES, "views": "simclr-32"}},
    "byol": {"objective": {"name": "byol", **HEADS}, "encoder": VIT, "data": {**IMAGES, "views": "simclr-32"}},
    "mlm": {"objective": {"name": "mlm"}, "encoder": TEXT, "data": TOKENS},
    "clm": {"objective": {"name": "clm"}, "encoder": {**TEXT, "causal": True}, "data": TOKENS},
}


def run(folder: Path, config: Path, ranks: int, parallel: str, steps: int, float64: bool, start: Path | None) -> Path:
    """One run by torchrun."""
    out = folder / f"{config.stem}-{ranks}-{parallel}-{steps}-{float64}"
    arguments = [config, "--run.dir", out, "--run.parallel", parallel, "--optim.steps", steps]
    arguments += ["--init-from", start] if start else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command += [__file__, "--rank", *arguments, "--run.expect-processes", ranks]
    env = {**os.environ, "AGREEMENT_FLOAT64": "1" if float64 else "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return out


def gradients(out: Path) -> dict:
    from selfsup.checkpoint import read_tensors

    tensors = read_tensors(out / "checkpoints" / "step-00000001", "optimizer")
    return {k: v.double() / 0.1 for k, v in tensors.items() if k.startswith("exp_avg:")}


def error(ours: dict, theirs: dict) -> float:
    norms = {k: g.norm().item() for k, g in theirs.items()}
    typical = statistics.median(norms.values())
    sizes = {k: norm if norm > 1e-5 * typical else typical for k, norm in norms.items()}
    return max((ours[k] - theirs[k]).norm().item() / sizes[k] for k in theirs)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    vocabulary = Path("data/python-docs/tokenizer.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for objective in options.objectives:
            content = dict(CONFIGS[objective])
            content["optim"] = {"batch_size": 32, "base_lr": 1e-3, "lr_scaling": "none"}
            content["run"] = {"dir": "x", "device": "cpu", "workers": 0, "log_every": 1,
                              "checkpoint_every": 1, "keep_checkpoints": options.steps + 1, "picture_every": 0, "monitor_every": 0}  # fmt: skip
            if content["data"] is TOKENS:
                size = len(json.loads(vocabulary.read_text())["model"]["vocab"])
                content["encoder"] = {**content["encoder"], "vocab_size": size}
            config = folder / f"{objective}.yaml"
            config.write_text(yaml.safe_dump(content))
            start = run(folder, config, 1, "ddp", 3, False, None)  # weights at no special value
            whole = run(folder, config, 1, "ddp", options.steps, True, start)
            exact, alone = gradients(whole), lines(whole)
            for ranks, parallel in LAYOUTS:
                found = run(folder, config, ranks, parallel, options.steps, True, start) if ranks > 1 else whole
                off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines(found), alone, strict=True))
                told = lines(run(folder, config, ranks, parallel, options.steps, False, start))
                speed = next(k for k in told[0] if k.endswith("_per_s"))
                unit = 64 if speed.startswith("tokens") else 1
                pace = statistics.median(line[speed] / unit / 32 for line in told[2:])
                print(f"| {objective} | {ranks} | {parallel if ranks > 1 else '-'} | {error(gradients(found), exact):.1e} | "
                      f"{off:.1e} | {pace:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        import torch

        from selfsup.dist import finish
        from selfsup.train import main as train

        torch.set_num_threads(1)
        if os.environ["AGREEMENT_FLOAT64"]:
            torch.set_default_dtype(torch.float64)
        sys.exit(finish(train(sys.argv[2:])))
    main()
