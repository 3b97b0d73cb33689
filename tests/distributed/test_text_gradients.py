"""On W processes with accumulation A the gradient of a text objective is that of one process on the global batch.

Where micro-batches have different numbers of targets, too. Through `train()` and Accelerate's wrapper, every
parameter, 4 blocks deep; the gradients are read out of Adam's first moment after one step.
"""

import pytest
from torch.nn.parallel import DistributedDataParallel

from ranks import on_ranks
from running import Server, first_gradients, read_trace
from selfsup import dist
from text_runs import build, make_token_shards, masked, write_text_config

LAYOUTS = [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]  # (processes, accumulation) of a batch of 8
FEW = [(1, 4), (4, 2)]
CASES = {
    "mlm": ("{name: mlm}", "", "packing: pad"),
    "clm": (
        "{name: clm, z_loss: 0.01}",
        "causal: true, positions: rope, num_kv_heads: 1, norm: rms",
        "packing: pad",
    ),
    "packed": ("{name: clm, tied: false}", "causal: true", "packing: bestfit, document_mask: true"),
    "pairs": (
        "{name: mlm, next_sentence: true}",
        "token_types: 2, post_norm: true, embed_norm: true",
        "packing: pairs",
    ),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A server, and for each case a config and weights in which nothing is at a special value."""
    folder = tmp_path_factory.mktemp("text-gradients")
    shards, server = make_token_shards(folder / "shards"), Server()
    configs, found = {}, {}

    def gradients(case, ranks, accumulation, *overrides, **options):
        if case not in configs:
            configs[case] = write_text_config(folder / f"{case}.yaml", shards, *CASES[case])
            started = [configs[case], "--run.dir", folder / case, "--optim.steps", 3]
            server.run(started, folder / "log")
        name = "-".join(map(str, [case, ranks, accumulation, *overrides, *options.values()]))
        if name in found:
            return found[name]
        arguments = [
            configs[case],
            "--init-from",
            folder / case,
            "--run.dir",
            folder / name,
            "--optim.steps",
            1,
        ]
        arguments += ["--run.micro-batch", 8 // ranks // accumulation, *overrides]
        trace = str(folder / f"{name}.trace")
        server.run(arguments, folder / "log", ranks, trace=trace, **options)
        gradient = first_gradients(folder / name)
        assert len(gradient) > 25 and all(g.norm() > 0 for g in gradient.values())
        found[name] = gradient, read_trace(trace, "batch", ranks, accumulation)[0]
        return found[name]

    yield gradients
    server.close()


def errors(ours: dict, theirs: dict) -> dict[str, float]:
    """The error of each tensor over its norm."""
    assert ours.keys() == theirs.keys()
    return {k: ((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs}


def targets(rows: list, parts: int) -> set[int]:
    """The numbers of targets of so many equal parts of a global batch."""
    size = len(rows) // parts
    return {sum(row[3][0] for row in rows[i : i + size]) for i in range(0, len(rows), size)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_float64(bench, case):
    whole, rows = bench(case, 1, 1, float64=True)
    for ranks, accumulation in LAYOUTS if case in ("mlm", "clm") else [(2, 2), (4, 1)]:
        assert len(targets(rows, ranks * accumulation)) > 1, "micro-batches of as many targets prove little"
        gradient, same_rows = bench(case, ranks, accumulation, float64=True)
        assert same_rows == rows
        assert max(errors(gradient, whole).values()) < 1e-10, (ranks, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlm", "clm"])
def test_float32(bench, case):
    """1e-5 of a tensor's norm, or twice what one process is off float64."""
    exact, whole = bench(case, 1, 1, float64=True)[0], bench(case, 1, 1)[0]
    rounding = errors(whole, exact)
    assert 1e-9 < max(rounding.values()) < 1e-4
    for ranks, accumulation in FEW:
        gradient = bench(case, ranks, accumulation)[0]
        near, off = errors(gradient, whole), errors(gradient, exact)
        for name in near:
            assert near[name] < 1e-5 or off[name] <= 2 * rounding[name], (name, ranks, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlm", "clm", "pairs"])
def test_bf16_is_no_worse_than_one_process(bench, case):
    exact = bench(case, 1, 1, float64=True)[0]

    def worst(ranks, accumulation):
        gradient = bench(case, ranks, accumulation, "--precision.mixed", "bf16")[0]
        # A new model's [CLS] states are so alike that the pairs' terms cancel, down to what bf16 rounds off.
        return max(e for name, e in errors(gradient, exact).items() if "next_sentence" not in name)

    baseline = worst(1, 1)
    assert 1e-4 < baseline < 0.05  # bf16 really was on
    for ranks, accumulation in FEW:
        assert worst(ranks, accumulation) <= 2 * baseline, (ranks, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case,mutant,ranks,accumulation",
    [
        ("mlm", "tokens_mean_of_means", 1, 4),
        ("clm", "tokens_mean_of_means", 2, 2),
        ("mlm", "tokens_no_world_factor", 2, 1),
        ("clm", "tokens_no_world_factor", 2, 1),
        ("pairs", "pairs_no_world_factor", 2, 1),
        ("pairs", "pairs_mean_of_means", 1, 2),
        ("mlm", "masks_from_a_generator", 2, 1),
    ],
)
def test_planted_bugs_are_caught(bench, case, mutant, ranks, accumulation):
    whole, rows = bench(case, 1, 1, float64=True)
    wrong, other_rows = bench(case, ranks, accumulation, float64=True, mutant=mutant)
    assert max(errors(wrong, whole).values()) > 1e-3
    assert (other_rows != rows) is (mutant == "masks_from_a_generator")


@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_without_targets_holds_nobody_up(tmp_path, tied):
    """It has a gradient of zeros for every parameter, those of the head too, and DDP's sums go on."""

    def norms(model, module, batch):
        for _ in range(2):  # DDP complains in the step after
            model.zero_grad()
            model(batch, 5.0).loss.backward()
        return [(name, p.grad.norm().item()) for name, p in module.named_parameters()]

    def check():
        module = build("mlm", tied=tied).double()
        batch = masked([3, 2] if dist.rank() == 0 else [0, 0])
        return norms(DistributedDataParallel(module), module, batch)

    module = build("mlm", tied=tied).double()
    alone = norms(module, module, masked([3, 2]))
    for found in on_ranks(2, check, tmp_path):
        assert found == [(name, pytest.approx(norm, rel=1e-12)) for name, norm in alone]
