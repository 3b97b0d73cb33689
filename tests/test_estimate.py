"""The memory of a step from shapes alone: against what real steps take, and planted omissions; what would make it fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from running import make_shards
from selfsup import dry_run, estimate, headroom
from selfsup.attention.tiled import tiled_attention
from selfsup.config import validate
from selfsup.estimate import Memory, Storages
from selfsup.headroom import GIB, Limit, Way, cgroup_room, remedies
from selfsup.layers import attention
from selfsup.layers.attention import Scope
from selfsup.layers.block import Block
from selfsup.recipe import Recipe, load_recipe

TOOL = Path(__file__).parent.parent / "tools" / "memory.py"
CPU = torch.device("cpu")


def recipe_of(content):
    """A recipe whose data need not be there; later sections are added to the first."""
    data, run = {"shards": "none", **content.get("data", {})}, {"dir": "none", **content.get("run", {})}
    return validate(Recipe, {**content, "data": data, "run": run})


def measured(content, ranks=1):
    """Two real steps in processes of their own; the most bytes that torch's allocator had out at once, in one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [str(TOOL), "--measure", "allocator", json.dumps(content)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *command],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


RESNET = {"name": "timm", "model": "resnet18", "img_size": 32, "stem": "cifar"}
MODELS = {
    "mae": {
        "encoder": {"img_size": 112, "embed_dim": 384, "depth": 6, "num_heads": 6},
        "objective": {"name": "mae", "decoder_embed_dim": 256, "decoder_depth": 2},
        "optim": {"batch_size": 16},
        "precision": {"mixed": "bf16"},
    },
    "mlm": {
        "objective": {"name": "mlm"},
        "encoder": {"name": "text", "embed_dim": 256, "depth": 4, "num_heads": 8, "post_norm": True, "embed_norm": True},
        "data": {"name": "text"},
        "optim": {"batch_size": 16, "clip_grad_norm": 1.0},
        "run": {"micro_batch": 8},
    },
    "byol": {
        "objective": {"name": "byol", "hidden_dim": 1024},
        "encoder": RESNET,
        "data": {"views": "simclr-32"},
        "optim": {"name": "lars", "batch_size": 16, "ema": 0.99},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_three_models_within_a_fifth_of_what_real_steps_take(name):
    """The allocator's own account (torch.profiler), which the estimate does not use."""
    assert estimate.estimate(recipe_of(MODELS[name])).peak == pytest.approx(measured(MODELS[name]), rel=0.2)


LONG = {  # most of it attention's matrices of scores
    "encoder": {"img_size": 64, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "objective": {"name": "mae", "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4},
    "optim": {"batch_size": 4},
}
SHORT = {  # the same in three blocks
    "encoder": {"img_size": 64, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4},
    "objective": {"name": "mae", "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4},
}
HEAVY = {  # most of it state
    "encoder": {"img_size": 32, "embed_dim": 768, "depth": 2, "num_heads": 6},
    "objective": {"name": "mae", "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2},
    "optim": {"batch_size": 4},
}


def forget_moments(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def take_fp32(monkeypatch):
    """Activations as if there were no autocast."""
    monkeypatch.setitem(estimate.TYPES, "bf16", torch.float32)


def ignore_checkpointing(monkeypatch):
    monkeypatch.setattr(
        Block, "forward", lambda self, x, rotation=None: self.residuals(x, rotation, Scope(), None)
    )


def forget_scores(monkeypatch):
    """Attention as if it held no matrix of scores."""
    monkeypatch.setattr(attention, "attention_function", lambda name: tiled_attention)


KEPT_LITTLE = {**LONG, "precision": {"mixed": "bf16"}, "run": {"activation_checkpointing": True}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "content,bugs",
    [(HEAVY, [forget_moments]), (KEPT_LITTLE, [take_fp32, ignore_checkpointing, forget_scores])],
    ids=["state", "activations"],
)
def test_planted_omissions_are_caught(monkeypatch, content, bugs):
    truth, recipe = measured(content), recipe_of(content)
    assert estimate.estimate(recipe).peak == pytest.approx(truth, rel=0.1)
    for bug in bugs:
        with monkeypatch.context() as patch:
            bug(patch)
            assert estimate.estimate(recipe).peak != pytest.approx(truth, rel=0.2), bug.__name__


@pytest.mark.slow
def test_two_real_processes_hold_ddp_s_buckets():
    """Without them the estimate would be a fifth short."""
    content = {**HEAVY, "optim": {"batch_size": 8}}
    truth, found = measured(content, ranks=2), estimate.estimate(recipe_of(content), 2)
    assert found.peak == pytest.approx(truth, rel=0.1)
    assert found.peak - found.parallel != pytest.approx(truth, rel=0.2)


def test_state_by_hand():
    """A linear layer's worth of everything: counted from the parameters of a model that is really built."""
    content = {**HEAVY, "optim": {"batch_size": 4, "ema": 0.9}}
    recipe = recipe_of(content)
    objective = recipe.objective.build(recipe.encoder)
    weights = sum(4 * p.numel() for p in objective.parameters())
    trainable = sum(4 * p.numel() for p in objective.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in objective.parameters())
    found = estimate.estimate(recipe)
    assert (found.weights, found.gradients, found.average) == (weights, trainable, weights)
    assert found.optimizer == 2 * trainable + 4 * tensors  # and a step count a tensor
    assert found.parallel == 0 and found.state + found.activations <= found.peak + trainable


def test_activations_by_hand():
    """What autograd keeps of a real forward pass, read off its graph by torch's hooks."""
    recipe = recipe_of(HEAVY)
    objective = recipe.objective.build(recipe.encoder)
    own, saved = {p.untyped_storage().data_ptr() for p in objective.parameters()}, {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = estimate._batch(recipe, 4, CPU)._replace(images=torch.randn(4, 3, 32, 32))
    batch = batch._replace(epoch=torch.zeros(4).long(), position=torch.arange(4))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(batch, 4.0)
    assert estimate.estimate(recipe).activations == pytest.approx(sum(saved.values()), rel=0.02)


def test_accumulation_keeps_the_gradients():
    """With several micro-batches the gradients are there while the activations are; peaks differ by about them."""
    once = estimate.estimate(recipe_of({**HEAVY, "optim": {"batch_size": 64}}))
    content = {**HEAVY, "optim": {"batch_size": 128}, "run": {"micro_batch": 64}}
    twice = estimate.estimate(recipe_of(content))
    assert twice.activations == once.activations and twice.state == once.state
    assert once.peak < twice.peak <= once.peak + once.gradients


def test_processes():
    """DDP holds its buckets beside the gradients; FSDP2 a share of all state."""
    content = {**HEAVY, "optim": {"batch_size": 16}, "run": {"micro_batch": 4}}
    recipe = recipe_of(content)
    alone, ddp = estimate.estimate(recipe, 1), estimate.estimate(recipe, 2)
    assert ddp.parallel == ddp.gradients and ddp.peak == alone.peak + ddp.gradients
    four = estimate.estimate(recipe, 4, fsdp=True)
    assert (four.weights, four.gradients) == (-(-alone.weights // 4), -(-alone.gradients // 4))
    assert four.peak < ddp.peak
    with pytest.raises(ValueError, match="expected a multiple of run.micro_batch x processes"):
        estimate.estimate(recipe, 3)


def test_a_contrast_is_not_cut_into_micro_batches():
    content = {"objective": {"name": "simclr"}, "encoder": RESNET, "data": {"views": "simclr-32"},
               "optim": {"batch_size": 8}, "run": {"micro_batch": 2}}  # fmt: skip
    with pytest.raises(ValueError, match="run.micro_batch: simclr contrasts all images of a batch"):
        estimate.estimate(recipe_of(content))


def test_storages_are_followed_to_their_end():
    """Views, in-place operations and what is freed: by hand, in float32."""
    with Storages() as storages:
        a = torch.empty(100)
        b = a[10:].add_(1)
        c = a + 1
        del a, c
        d = torch.empty(50, dtype=torch.float64)
        del b, d
    assert [size for _, size in storages.events] == [400, 400, -400, 400, -400, -400]
    assert storages.curve(set()) == [0, 400, 800, 400, 800, 400, 0] or max(storages.curve(set())) == 800


HUGE = Path(__file__).parent.parent / "configs" / "mae" / "imagenet-huge.yaml"


def test_a_model_larger_than_the_machine():
    """Nothing is allocated, nothing computed: the process grows by less than a thousandth of the estimate."""
    recipe = load_recipe(HUGE, ["--run.dir", "none", "--encoder.depth", "8"])
    before, found = psutil.Process().memory_info().rss, estimate.estimate(recipe)
    assert found.peak > 200 * GIB and psutil.Process().memory_info().rss - before < found.peak / 1000


def limit(memory, share):
    """One that `share` of a step's peak just fits."""
    return Limit(int(headroom.ROOM * memory.peak * share) + headroom.LIBRARIES + 1, "a test")


def test_remedies_were_tried():
    """Each keeps its word when the recipe is made anew with it, and the micro-batch is the largest that fits."""
    content = {**SHORT, "optim": {"batch_size": 48}}
    begin = Way(recipe_of(content), 1, False, CPU)
    most = limit(begin.estimate(), 0.8)
    found = {remedy.words.split()[0]: remedy for remedy in remedies(begin, most)}
    assert {"--encoder.attention", "--run.activation-checkpointing", "--run.micro-batch", "--run.parallel"} <= set(
        found
    )
    anew = {
        "--encoder.attention": {**content, "encoder": {**SHORT["encoder"], "attention": "tiled"}},
        "--run.activation-checkpointing": {**content, "run": {"activation_checkpointing": True}},
    }
    for words, changed in anew.items():
        assert estimate.estimate(recipe_of(changed)) == found[words].memory and most.fits(found[words].memory)
    size = int(found["--run.micro-batch"].words.split()[-1])
    fitting = [m for m in (8, 12, 16, 24)
               if most.fits(estimate.estimate(recipe_of({**content, "run": {"micro_batch": m}})))]  # fmt: skip
    assert size == max(fitting) and size < 48


def test_remedies_that_do_not_apply_are_not_offered():
    """A ResNet has no attention and no blocks; SimCLR no micro-batches, and with BatchNorm no chunks."""
    content = {"objective": {"name": "simclr"}, "encoder": RESNET, "data": {"views": "simclr-32"},
               "optim": {"batch_size": 16}}  # fmt: skip
    begin = Way(recipe_of(content), 1, False, CPU)
    words = [remedy.words for remedy in remedies(begin, limit(begin.estimate(), 0.8))]
    assert words and all(w.startswith(("--precision.mixed bf16", "on ", "--run.parallel fsdp2 on ")) for w in words), words
    alone = recipe_of({**SHORT, "optim": {"batch_size": 1}})
    assert remedies(Way(alone, 1, False, CPU), Limit(1, "nothing")) == []


def test_chunks_of_a_contrast_without_batch_norm():
    content = {"objective": {"name": "simclr"}, "data": {"views": "simclr-32"}, "optim": {"batch_size": 64},
               "encoder": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}}  # fmt: skip
    begin = Way(recipe_of(content), 1, False, CPU)
    most = limit(begin.estimate(), 0.6)
    (chunk,) = [r for r in remedies(begin, most) if r.words.startswith("--objective.chunk")]
    size = int(chunk.words.split()[-1])
    again = estimate.estimate(recipe_of({**content, "objective": {"name": "simclr", "chunk": size}}))
    assert again == chunk.memory and most.fits(again)


def test_together_where_nothing_helps_alone():
    """Two samples in micro-batches of one: the least that one key reaches, less a tenth."""
    begin = Way(recipe_of({**SHORT, "optim": {"batch_size": 2}}), 1, False, CPU)
    keys = ({"precision": {"mixed": "bf16"}}, {"run": {"micro_batch": 1}}, {"run": {"activation_checkpointing": True}},
            {"encoder": {"attention": "tiled"}})  # fmt: skip
    alone = min(begin.changed(change).estimate().peak for change in keys)
    found = remedies(begin, Limit(int(headroom.ROOM * alone * 0.9) + headroom.LIBRARIES, "a test"))
    assert found[0].words.count("--") > 1 and found[0].memory.peak <= 0.9 * alone


def test_control_groups(tmp_path):
    """Version 2: the group's own limit and its parent's, the narrower counts; file caches are room."""
    own, root = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text("0::/job/step\n")
    assert cgroup_room(root, own) is None
    for folder, limit_, used, cache in (
        (root / "job", 1000, 600, 100),
        (root / "job" / "step", "max", 500, 0),
    ):
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit_}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 3\ninactive_file {cache}\n")
    assert cgroup_room(root, own) == 500
    (root / "job" / "step" / "memory.max").write_text("700")
    assert cgroup_room(root, own) == 200
    own.write_text("3:cpu:/x\n7:memory:/docker/1\n")  # version 1, the container's group mounted as the root
    assert cgroup_room(root, own) is None
    folder = root / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    (folder / "memory.usage_in_bytes").write_text("10")
    (folder / "memory.stat").write_text("cache 5\n")
    assert cgroup_room(root, own) is None
    (folder / "memory.limit_in_bytes").write_text("4096")
    assert cgroup_room(root, own) == 4086


def test_a_dry_run_that_does_not_fit(tmp_path, monkeypatch, capsys):
    """It says so, what would help, and takes nothing through; an unknown limit stops nothing."""
    data = {"shards": str(make_shards(tmp_path / "shards")), "mean": [0.4], "std": [0.3]}
    encoder = {**SHORT["encoder"], "in_chans": 1}
    recipe = recipe_of({**SHORT, "encoder": encoder, "data": data, "optim": {"batch_size": 16},
                        "run": {"workers": 0, "expect_processes": 2}})  # fmt: skip
    monkeypatch.setattr(dry_run, "limit_of", lambda device, here: Limit(None, f"unknown, for each of {here}"))
    dry_run.dry_run(recipe)
    out = capsys.readouterr().out
    assert "fits: unknown, for each of 2" in out and "one micro-batch of 8 samples went through" in out
    assert "MiB of DDP's buckets" in out and "processes  2 on cpu" in out
    peak = estimate.estimate(recipe, 2).peak
    narrow = Limit(int(headroom.ROOM * peak * 0.9) + headroom.LIBRARIES, "0.1 GiB of a test")
    monkeypatch.setattr(dry_run, "limit_of", lambda device, here: narrow)
    dry_run.dry_run(recipe)
    out = capsys.readouterr().out
    assert "DOES NOT FIT: 0.1 GiB of a test" in out and "went through" not in out
    assert "no micro-batch was taken through" in out and "  --run.micro-batch " in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_three_models_on_a_gpu(name):
    """max_memory_allocated of two real steps; cuBLAS's workspace, which no shape tells, is left out of it."""
    found = estimate.estimate(recipe_of(MODELS[name]), device=torch.device("cuda")).peak
    assert found == pytest.approx(measured(MODELS[name]), rel=0.2)


def test_the_verdict():
    memory = Memory(0, 0, 0, 0, 0, 0, peak=10 * GIB)
    assert Limit(None, "").fits(memory) and Limit(13 * GIB, "").fits(memory)
    assert not Limit(12 * GIB, "").fits(memory)  # ROOM and LIBRARIES
