"""Batch norm over real processes against one nn.BatchNorm on all their samples."""

import copy

import pytest
import torch
from torch import nn

from ranks import on_ranks
from selfsup import dist
from selfsup.layers import batch_norm
from selfsup.layers.batch_norm import BatchNormOverRanks, synchronise


def without_bias(norm):
    norm.bias = None
    return norm


def frozen_bias(norm):
    norm.bias.requires_grad_(False)
    return norm


EVEN, UNEVEN = (3, 3, 3, 3), (5, 2, 0, 6)  # samples of rank 0, 1, ...
CASES = {
    "2 dimensions": (lambda: nn.BatchNorm1d(5), (5,), EVEN),
    "3 dimensions": (lambda: nn.BatchNorm1d(5), (5, 4), EVEN),
    "pictures": (lambda: nn.BatchNorm2d(3), (3, 4, 2), EVEN),
    "volumes": (lambda: nn.BatchNorm3d(3), (3, 2, 2, 2), EVEN),
    "uneven": (lambda: nn.BatchNorm2d(3, momentum=0.3, eps=1e-3), (3, 4, 2), UNEVEN),
    "no weight and bias": (lambda: nn.BatchNorm1d(5, affine=False), (5,), UNEVEN),
    "no bias": (lambda: without_bias(nn.BatchNorm1d(5)), (5,), UNEVEN),
    "frozen bias": (lambda: frozen_bias(nn.BatchNorm1d(5)), (5,), EVEN),
    "cumulative": (lambda: nn.BatchNorm1d(5, momentum=None), (5,), UNEVEN),
    "no running statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (5,), EVEN),
}
STEPS = 3


def made(make, dtype=torch.float64):
    """A batch norm in a Sequential, nothing in it at a special value."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def data(step: int, shape: tuple, counts: tuple) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Everyone's inputs and the gradients of their outputs in float64, and which of them are ours. The means
    of the ranks lie far apart, and from 0."""
    counts = counts[: dist.world_size()]
    generator = torch.Generator().manual_seed(step)
    x, dy = torch.randn(2, sum(counts), *shape, generator=generator, dtype=torch.float64)
    of_rank = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = x * 3 + 10 + 5 * of_rank.view(-1, *[1] * len(shape))
    first = sum(counts[: dist.rank()])
    return x, dy, slice(first, first + counts[dist.rank()])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value, or over 1e-3 where all are smaller (sums that cancel)."""
    if theirs.numel() == 0:
        return 0.0
    assert ours.isfinite().all() and theirs.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item()


def run(case: str) -> dict[str, float]:
    """Differences from one process after some steps in float64: of outputs, gradients, running statistics."""
    make, shape, counts = CASES[case]
    ours, theirs = made(make), made(make)
    synchronise(ours)
    assert isinstance(ours[0], BatchNormOverRanks) and [*ours.state_dict()] == [*theirs.state_dict()]
    found = {}
    for step in range(STEPS):
        x, dy, rows = data(step, shape, counts)
        whole, part = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
        y, expected = ours(part), theirs(whole)
        y.backward(dy[rows])
        expected.backward(dy)
        found[f"output {step}"] = apart(y, expected[rows])
        found[f"input gradient {step}"] = apart(part.grad, whole.grad[rows])
    for name, p in theirs.named_parameters():
        q = ours.get_parameter(name)
        assert (q.grad is None) == (p.grad is None)
        if p.grad is not None:  # ours: local sums, which DDP makes the global one
            found[f"{name} gradient"] = apart(dist.all_reduce(q.grad), p.grad)
    for name, value in theirs.named_buffers():
        found[name] = apart(ours.get_buffer(name).double(), value.double())
    found["eval"] = apart(ours.eval()(x), theirs.eval()(x))
    return found


def run_all() -> dict[str, dict[str, float]]:
    return {case: run(case) for case in CASES}


@pytest.mark.parametrize("world", [2, 4])
def test_float64_is_one_process(world, tmp_path):
    for answer in on_ranks(world, run_all, tmp_path):
        assert len(answer["uneven"]) == 2 * STEPS + 2 + 3 + 1
        for case, found in answer.items():
            assert max(found.values()) < 1e-12, (case, found)


def local_statistics():
    dist.all_gather = lambda x: x


def biased_running_variance():
    original = BatchNormOverRanks._track
    BatchNormOverRanks._track = lambda self, mean, var, count: original(self, mean, var, 10**15)


def running_variance_unbiased_by_the_local_count():
    original, world = BatchNormOverRanks._track, dist.world_size()
    BatchNormOverRanks._track = lambda self, mean, var, count: original(self, mean, var, count // world)


def local_backward():
    dist.all_reduce = lambda x: x


def mean_of_variances():
    original = batch_norm.moments_over_ranks

    def moments(x):
        mean, _, count = original(x)
        variances = dist.all_gather(x.transpose(0, 1).flatten(1).var(1, correction=0)[None])
        return mean, variances.mean(0), count

    batch_norm.moments_over_ranks = moments


def mean_of_means():
    original = dist.all_gather

    def gather(x):
        everyone = original(x)
        everyone[:, -1] = everyone[:, -1].mean()
        return everyone

    dist.all_gather = gather


BUGS = {
    local_statistics: ("pictures", "output 0"),
    biased_running_variance: ("pictures", "0.running_var"),
    running_variance_unbiased_by_the_local_count: ("pictures", "0.running_var"),
    local_backward: ("pictures", "input gradient 0"),
    mean_of_variances: ("pictures", "output 0"),
    mean_of_means: ("uneven", "output 0"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug, tmp_path):
    case, where = BUGS[bug]

    def check() -> float:
        bug()  # in a forked process: nothing to undo
        return run(case)[where]

    assert max(on_ranks(2, check, tmp_path)) > 1e-3


def rounded() -> list[tuple[torch.dtype, list[float], list[float]]]:
    """For fp32, bf16, and bf16 under autocast: the dtype, errors against float64 of output, input gradient and
    weight gradient, and those of one process."""
    results = []
    for dtype, mixed in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        exact, alone = made(lambda: nn.BatchNorm2d(3)), made(lambda: nn.BatchNorm2d(3), torch.float32)
        exact.load_state_dict(alone.state_dict())
        ours = copy.deepcopy(alone)
        synchronise(ours)
        x, dy, rows = data(0, (3, 8, 8), EVEN)
        x, dy = x.to(dtype), dy.to(dtype)
        whole = x.double().requires_grad_()
        expected = exact(whole)
        expected.backward(dy.double())
        errors = []
        for model, mine in ((ours, rows), (alone, slice(None))):
            part = x[mine].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                y = model(part)
            y.backward(dy[mine])
            assert y.dtype == part.grad.dtype == dtype and model[0].running_var.dtype == torch.float32
            weight = model[0].weight.grad if model is alone else dist.all_reduce(model[0].weight.grad)
            errors.append([
                apart(y.double(), expected[mine]),
                apart(part.grad.double(), whole.grad[mine]),
                apart(weight.double(), exact[0].weight.grad),
            ])  # fmt: skip
        results.append((dtype, *errors))
    return results


def test_lower_precision_is_no_worse_than_one_process(tmp_path):
    for answer in on_ranks(2, rounded, tmp_path):
        for dtype, ours, alone in answer:
            for error, baseline in zip(ours, alone):
                assert error <= 2 * max(baseline, torch.finfo(dtype).eps), (dtype, ours, alone)


def networks() -> dict[str, float]:
    """Differences in timm's networks, with BatchNorm2d and BatchNormAct2d: gradients, statistics, eval."""
    import timm

    found = {}
    for name, norm in (("resnet18", nn.BatchNorm2d), ("mobilenetv3_small_050", timm.layers.BatchNormAct2d)):
        torch.manual_seed(0)
        theirs = timm.create_model(name, num_classes=3).double()
        for module in (m for m in theirs.modules() if isinstance(m, norm)):
            nn.init.normal_(module.weight, 1, 0.2)  # timm starts some at 0, where nothing is learned
        ours = copy.deepcopy(theirs)
        synchronise(ours)
        assert any(type(module) is norm for module in theirs.modules())
        assert not any(type(module) is norm for module in ours.modules())
        x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
        rows = slice(0, 2) if dist.rank() == 0 else slice(2, 6)
        theirs(x).square().sum().backward()
        ours(x[rows]).square().sum().backward()
        for key, p in theirs.named_parameters():
            found[f"{name} {key}"] = apart(dist.all_reduce(ours.get_parameter(key).grad), p.grad)
        for key, value in theirs.named_buffers():
            found[f"{name} {key}"] = apart(ours.get_buffer(key).double(), value.double())
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        found[f"{name} eval"] = apart(ours.eval()(x), theirs.eval()(x))
    return found


def test_networks_of_timm(tmp_path):
    import timm  # noqa: F401  # once, before the ranks are forked

    for found in on_ranks(2, networks, tmp_path):
        assert len(found) > 250 and max(found.values()) < 1e-9, max(found.items(), key=lambda item: item[1])


def compiled() -> float:
    model = made(lambda: nn.BatchNorm1d(5))
    synchronise(model)
    x, _, rows = data(0, (5,), EVEN)
    return apart(torch.compile(copy.deepcopy(model), backend="eager")(x[rows]), model(x[rows]))


def test_compiled_code_breaks_its_graph_there(tmp_path):
    import torch._dynamo  # noqa: F401  # once, before the ranks are forked

    assert on_ranks(2, compiled, tmp_path) == [0.0, 0.0]


def lonely() -> str:
    model = made(lambda: nn.BatchNorm1d(5))
    synchronise(model)
    with pytest.raises(ValueError) as fault:
        model(torch.zeros(1 - dist.rank(), 5, dtype=torch.float64))
    return str(fault.value)


def test_one_sample_in_all_is_refused_everywhere(tmp_path):
    expected = "batch norm: expected more than 1 value per channel in training, got 1"
    assert on_ranks(2, lonely, tmp_path) == [expected] * 2


def test_one_process_keeps_its_batch_norms():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    before = model[0]
    synchronise(model)
    assert model[0] is before


@pytest.fixture
def two_processes(monkeypatch):
    """As far as `synchronise` can see."""
    monkeypatch.setattr(dist, "world_size", lambda: 2)


def test_tensors_and_places_are_kept(two_processes):
    norm = nn.BatchNorm1d(3, eps=1e-4, momentum=0.2)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.Linear(3, 3))}).eval()
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    synchronise(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    ours = model["a"]
    assert ours is model["b"][0] and isinstance(ours, BatchNormOverRanks)  # shared, so replaced once
    assert (ours.eps, ours.momentum, ours.training) == (1e-4, 0.2, False)
    synchronise(model)
    assert model["a"] is ours


def test_on_cuda_they_are_those_of_pytorch(two_processes):
    from timm.layers import BatchNormAct2d

    for norm in (nn.BatchNorm2d(3), BatchNormAct2d(3), without_bias(nn.BatchNorm1d(3))):
        found = batch_norm._over_ranks("norm", norm, torch.device("cuda"))
        assert isinstance(found, nn.SyncBatchNorm) and found.weight is norm.weight and found.bias is norm.bias
        assert getattr(found, "act", None) is getattr(norm, "act", None)
        assert batch_norm._over_ranks("norm", found, torch.device("cuda")) is found


def test_other_kinds_are_refused_by_name(two_processes):
    from timm.layers.split_batchnorm import SplitBatchNorm2d

    for norm in (SplitBatchNorm2d(3), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3)):
        model = nn.Sequential(nn.Sequential(nn.ReLU(), norm))
        with pytest.raises(
            ValueError, match=rf"^0\.1: {type(norm).__name__} cannot take its statistics over"
        ):
            synchronise(model)
