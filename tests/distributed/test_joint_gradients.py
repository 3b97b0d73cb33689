"""SimCLR and BYOL: the gradient on W processes is that of one process on the global batch.

Through `train()` and Accelerate's wrapper, every parameter, read out of Adam's first moment after one
step. A loss value cannot catch these bugs: with the wrong gradients below it is right.
"""

import functools

import pytest

from joint import RESNET, VIT, make_colour_shards, write_joint_config
from running import Server, first_gradients, losses

KINDS = {  # name: (objective, encoder, options)
    "simclr": ("simclr", VIT, []),
    "chunked": ("simclr", VIT, ["--objective.chunk", 3]),
    "byol": ("byol", VIT, []),
    "resnet": ("byol", RESNET, []),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    shards, server = make_colour_shards(folder / "shards"), Server()

    @functools.cache
    def trained(kind):
        """A config, and weights in which nothing is at a special value."""
        name, encoder, options = KINDS[kind]
        arguments = [write_joint_config(folder, shards, name, encoder), *options]
        start = folder / f"{kind}-weights"
        server.run([*arguments, "--run.dir", start, "--optim.steps", 3], folder / "log")
        return [*arguments, "--init-from", start, "--optim.steps", 1]

    @functools.cache
    def gradients(kind, ranks, precision="float64", mutant=None):
        """(gradients, loss) of the first step from there."""
        run = folder / f"{kind}-{precision}-{ranks}-{mutant}"
        arguments = [*trained(kind), "--run.dir", run]
        if precision == "bf16":
            arguments += ["--precision.mixed", "bf16"]
        server.run(arguments, folder / "log", ranks, float64=precision == "float64", mutant=mutant)
        found = first_gradients(run)
        assert len(found) > 20 and not any(k.startswith("target_") for k in found)
        return found, losses(run)[0][1]

    yield gradients
    server.close()


def error(ours: dict, theirs: dict) -> float:
    """The largest error of a tensor over that tensor's norm. A bias that a batch norm takes out again has a
    gradient of nothing but rounding: such are measured against the median norm."""
    assert ours.keys() == theirs.keys()
    norms = {k: g.norm().item() for k, g in theirs.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    silent = {k for k, norm in norms.items() if norm < 1e-5 * typical}
    assert all(k == "encoder.norm.bias" or k.endswith(".0.bias") for k in silent), silent
    return max((ours[k] - theirs[k]).norm().item() / (typical if k in silent else norms[k]) for k in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_float64(bench, kind):
    whole, loss = bench(kind, 1)
    for ranks in (2, 4):
        found, its_loss = bench(kind, ranks)
        assert error(found, whole) < 1e-10, ranks
        assert its_loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_bf16(bench, kind):
    """fp32: 1e-5 of each tensor's norm, or twice the error of one process, where rounding alone is larger;
    bf16: twice the error of one process."""
    exact, _ = bench(kind, 1)
    for precision, floor in (("fp32", 1e-5), ("bf16", 0.0)):
        baseline = error(bench(kind, 1, precision)[0], exact)
        assert (1e-4 if precision == "bf16" else 1e-8) < baseline < 1  # it was on
        for ranks in (2, 4):
            assert error(bench(kind, ranks, precision)[0], exact) <= max(floor, 2 * baseline), (precision, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mutant"),
    [
        ("simclr", "no_grad_gather"),
        ("simclr", "gradient_over_world"),
        ("simclr", "wrong_own_slot"),
        ("simclr", "masked_diagonal_off_by_one"),
        ("byol", "local_batch_norm"),
        ("resnet", "local_batch_norm"),
    ],
)
def test_planted_bugs_are_caught(bench, kind, mutant):
    whole, loss = bench(kind, 1)
    wrong, its_loss = bench(kind, 2, mutant=mutant)
    assert error(wrong, whole) > 1e-3
    if mutant in ("no_grad_gather", "gradient_over_world"):
        assert its_loss == pytest.approx(loss, rel=1e-12)  # only the gradient tells
