"""The attention benchmark: what it counts, and what it gives no speed. Nothing here asserts on a time."""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.conformance import bench, measure, roofline
from selfsup.conformance.claims import Target
from selfsup.conformance.inputs import Shape

MEASURE_CEILINGS = roofline.measure_ceilings
KERNELS = """
import torch

SDPA = torch.nn.functional.scaled_dot_product_attention


def mean(q, k, v, is_causal=False):
    return v.mean(-2, keepdim=True).expand(q.shape).clone() + 0 * q + 0 * k


def refusing(*tensors, is_causal=False):
    raise NotImplementedError("no time for this")


def made(forward=SDPA, change=lambda q, *grads: grads):
    # another forward pass, or gradients that are changed on their way out
    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return forward(q, k, v)

        @staticmethod
        def backward(ctx, grad):
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                out = SDPA(*leaves)
            return change(leaves[0], *torch.autograd.grad(out, leaves, grad))

    return lambda q, k, v, is_causal=False: Made.apply(q, k, v)


def sdpa_or_seen(q, k, v):
    HITS.append((key := (q.shape, q.dtype, float(q.sum()))) in RESULTS)
    return RESULTS[key].clone() if HITS[-1] else RESULTS.setdefault(key, SDPA(q, k, v)).clone()


RESULTS, HITS = {}, []
forward_only = made(change=refusing)
half_dk = made(change=lambda q, dq, dk, dv: (dq, dk / 2, dv))
remembers = made(lambda q, k, v: RESULTS.setdefault(q.data_ptr(), SDPA(q, k, v)).clone())
remembers_dk = made(change=lambda q, dq, dk, dv: (dq, RESULTS.setdefault(q.data_ptr(), dk).clone(), dv))
by_content = made(sdpa_or_seen)


def only_at_16(q, k, v, is_causal=False):
    out = SDPA(q, k, v)
    return out if q.shape[-2] == 16 else out * 1.01
"""


@pytest.fixture
def kernels(tmp_path):
    """Names a kernel of the file above."""
    path = tmp_path / "bench_kernels.py"
    path.write_text(KERNELS)
    return lambda name: f"{path}:{name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings that are made up: measuring them takes seconds."""
    made_up = roofline.Ceilings(1e11, 512, 1e10, 1e9, "made up")
    monkeypatch.setattr(roofline, "measure_ceilings", lambda dtypes, device: dict.fromkeys(dtypes, made_up))
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.0)


def run(targets, tmp_path, **options):
    """Exit code, report, and rows by kernel."""
    options = {"against": ("reference",), "grid": ("1x2x17x8",), "dtypes": ("fp32",), "rounds": 5} | options
    code = bench.main_bench(tuple(targets), out=tmp_path / "out", **options)
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    return code, report, {row["kernel"]: row for row in report["rows"]}


@pytest.mark.parametrize("length, keys", [(1, 1), (7, 7), (5, 9), (9, 5), (1, 4), (4, 1)])
def test_causal_pairs_by_counting(length, keys):
    counted = int(torch.ones(length, keys).tril().sum())
    assert measure.allowed_pairs(length, keys, causal=True) == counted
    assert measure.allowed_pairs(length, keys, causal=False) == length * keys
    shape = Shape(2, 3, 3, length, keys, 4, 6)
    tasks = measure.work(shape, "fp32", causal=True)
    assert tasks["forward"].flops == 2 * (2 * 3 * counted) * (4 + 6)
    assert tasks["backward"].flops == 2.5 * tasks["forward"].flops
    assert tasks["backward"].exps == 2 * 3 * counted


@pytest.mark.parametrize(
    "dtype, lse", [("fp32", torch.float32), ("bf16", torch.float32), ("fp64", torch.float64)]
)
def test_bytes_are_those_of_the_tensors(dtype, lse):
    shape = Shape(2, 4, 2, 5, 7, 8, 6)
    like = {"dtype": measure.DTYPES[dtype]}
    q, out = torch.empty(2, 4, 5, 8, **like), torch.empty(2, 4, 5, 6, **like)
    k, v = torch.empty(2, 2, 7, 8, **like), torch.empty(2, 2, 7, 6, **like)
    rows = torch.empty(2, 4, 5, dtype=lse)
    tasks = measure.work(shape, dtype, causal=False)
    assert tasks["forward"].bytes == sum(x.nbytes for x in (q, k, v, out, rows))
    assert tasks["backward"].bytes == sum(x.nbytes for x in (q, k, v, out, rows, out, q, k, v))


def test_a_right_kernel_is_timed_and_drawn(tmp_path, capsys):
    code, report, rows = run(["tiled"], tmp_path, dtypes=("fp32,bf16",), causal=True)
    assert code == 0 and len(report["rows"]) == 4
    for row in report["rows"]:
        assert row["first_call_seconds"] > 0 and row["peak_bytes"] is not None
        assert row["dense_check"] == row["shape"]
        for name in roofline.PASSES:
            one = row[name]
            assert one["fault"] is None and len(one["seconds"]) == len(one["ratios"]) == 5
            assert min(one["seconds"]) > 0
            for low, middle, high in (one["seconds_quantiles"], one["ratio_quantiles"]):
                assert low <= middle <= high
    assert set(rows["reference"]["forward"]["ratios"]) == {1.0}
    assert report["settings"]["causal"] and report["environment"]["threads"] == torch.get_num_threads()
    with Image.open(tmp_path / "out" / "roofline.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "bench.md").read_text() in printed
    assert "ceilings, bf16" in printed and "1 thread(s)" in printed


@pytest.mark.parametrize(
    "name, verdict",
    [
        ("mean", "wrong: out: "),
        ("half_dk", "wrong: dk: "),
        ("remembers", "wrong: in the rounds: out: "),
        ("remembers_dk", "wrong: after the rounds: dk: "),
        ("refusing", "refused: NotImplementedError: no time for this"),
    ],
)
def test_no_speed_without_a_right_answer(name, verdict, kernels, tmp_path, capsys):
    code, _, rows = run([kernels(name)], tmp_path)
    row = rows[kernels(name)]
    for one in (row["forward"], row["backward"]):
        assert one["fault"].startswith(verdict) and one["seconds"] == [], one["fault"]
        assert one["seconds_quantiles"] is None and one["flops_per_second"] is None and one["note"] is None
    assert code == int(row["forward"]["fault"].startswith("wrong"))
    assert rows["reference"]["forward"]["seconds"]
    lines = capsys.readouterr().out.splitlines()
    line = next(text for text in lines if text.startswith("|") and f":{name} " in text)
    assert row["forward"]["fault"][:40] in line and "(" not in line.split("wrong: ")[0]


def test_a_memory_of_contents_is_of_no_use(kernels, tmp_path, monkeypatch):
    """Nothing that is timed was seen before, however often a short call is repeated within a round."""
    monkeypatch.setattr(measure, "ROUND_SECONDS", 0.01)
    code, _, rows = run([kernels("by_content")], tmp_path)
    assert code == 0 and len(rows[kernels("by_content")]["forward"]["seconds"]) == 5
    hits = sys.modules["bench_kernels"].HITS
    assert len(hits) >= 5 + 4 and not any(hits)


def test_fresh_numbers_are_the_same_in_every_layout():
    setting = measure.Setting(Shape(2, 3, 3, 5, 5, 4, 4), "bf16", seed=3)
    kernels = [dataclasses.replace(Target("torch").load(), layout=layout) for layout in ("BHLD", "BLHD")]
    calls = [setting.inputs(kernel) for kernel in kernels]
    assert calls[0].q.stride() != calls[1].q.stride()
    left, right = ((*inputs[:3], inputs.grad_out) for inputs in calls)  # to be written to
    seen = []
    for turn in (1, 2):
        draws = [setting.generator(turn) for _ in calls]
        for _ in range(2):
            for inputs, generator in zip(calls, draws):
                measure.redraw(inputs, generator)
            assert all(torch.equal(x, y) for x, y in zip(left, right))
            seen += [x.detach().clone() for x in left]
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(seen, 2))


def test_a_speed_above_the_ceilings_is_doubted(tmp_path, monkeypatch, capsys):
    slow = roofline.Ceilings(1e3, 512, 1e10, 1e9, "made up")
    monkeypatch.setattr(roofline, "measure_ceilings", lambda dtypes, device: dict.fromkeys(dtypes, slow))
    code, report, _ = run(["tiled"], tmp_path)
    assert code == 0
    for row in report["rows"]:
        for name in roofline.PASSES:
            assert row[name]["note"].startswith("over the ceiling: ") and row[name]["share_of_ceiling"] > 1.1
            assert row[name]["note"].endswith(" times the measured rate of products")
    for line in (text for text in capsys.readouterr().out.splitlines() if text.startswith("| fp32")):
        assert "%" not in line and line.count("over the ceiling: ") == 2 and line.count("| over ") == 2
    one = roofline.Pass(measure.Work(flops=1.0, bytes=1.05, exps=1.0), seconds=[1.0])
    assert roofline.Ceilings(1.0, 1, 1.0, 1.0, "").excess(one) is None


def test_a_forward_pass_alone_is_timed(kernels, tmp_path):
    code, _, rows = run([kernels("forward_only")], tmp_path)
    row = rows[kernels("forward_only")]
    assert code == 0 and len(row["forward"]["seconds"]) == 5
    assert row["backward"]["fault"].startswith("refused: backward: NotImplementedError")
    assert row["backward"]["seconds"] == []


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_the_timed_shape_are_checked_too(causal, kernels, monkeypatch):
    """The dense check alone would see length 16 only, and pass."""
    small = Shape(1, 1, 1, 16, 16, 8, 8)
    monkeypatch.setattr(bench, "affordable", lambda shape: small)
    target = Target(kernels("only_at_16"))
    setting = measure.Setting(Shape(2, 3, 3, 80, 80, 8, 8), "fp32")
    kernel = target.load()
    assert all(f.fault is None for f in bench.check_dense(setting, kernel, True))
    _, findings = measure.check_rows(setting, kernel, setting.inputs(kernel), True)
    assert {f.tensor for f in findings if f.fault} >= {"out", "dq", "dk", "dv"}
    setting = setting._replace(causal=causal)
    for name in ("reference", "tiled", "torch"):
        kernel = Target(name).load()
        _, findings = measure.check_rows(setting, kernel, setting.inputs(kernel), True)
        assert len(findings) == 4 and all(f.fault is None for f in findings), (name, findings)


def test_a_gradient_where_none_came_in_is_seen(monkeypatch):
    setting = measure.Setting(Shape(1, 2, 2, 40, 40, 8, 8), "fp32")
    kernel = Target("reference").load()
    right = type(kernel).answer

    def stray(self, inputs, gradients=True):
        answer = right(self, inputs, gradients)
        untouched = (inputs.grad_out == 0).all(-1).nonzero()[0].tolist()
        answer.dq[tuple(untouched)] += 1e-3
        return answer

    monkeypatch.setattr(type(kernel), "answer", stray)
    _, findings = measure.check_rows(setting, kernel, setting.inputs(kernel), True)
    assert [f.tensor for f in findings if f.fault] == ["dq"]


def test_shapes_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 10_000_000)
    setting = measure.Setting(Shape(1, 2, 2, 1024, 1024, 16, 16), "fp32")
    names = ("reference", "tiled", "torch")
    refusals = {n: measure.memory_refusal(setting, Target(n).load(), Target(n)) for n in names}
    assert refusals["tiled"] is None  # claims linear memory
    assert refusals["torch"] is None  # does not, but is
    assert "keeps (l, s) matrices, about 0.05 GB" in refusals["reference"]
    code, _, rows = run(["reference"], tmp_path, against=(), grid=("1x2x1024x16",))
    assert code == 0 and rows["reference"]["forward"]["fault"].startswith("refused: keeps (l, s) matrices")
    assert rows["reference"]["first_call_seconds"] is None


def test_dense_shapes_are_of_their_kind():
    for name, grid in bench.GRIDS.items():
        for shape in grid:
            small = bench.affordable(shape)
            assert small.l == small.s and small.l % 64 == shape.l % 64 and small.d == shape.d, name
            assert 1 <= small.h <= shape.h and 1 <= small.b <= shape.b and small.l <= shape.l
            assert small.b * small.h * small.l * small.s <= 2**23


def test_grids_and_bad_arguments(tmp_path):
    assert bench.read_grid(("vit", "8x6x197", "1x2x3x40"))[4:] == [Shape(1, 2, 2, 3, 3, 40, 40)]
    assert all(math.prod((s.b, s.l)) >= 4096 for s in bench.GRIDS["lengths"])
    for wrong, word in (
        ({"grid": ("vits",)}, "grid"),
        ({"dtypes": ("fp8",)}, "dtypes"),
        ({"rounds": 4}, "rounds"),
        ({"against": ("nothing",)}, "nothing"),
        ({"features": "fp33"}, "feature"),
    ):
        with pytest.raises(ValueError, match=f"^{word}: "):
            run(["tiled"], tmp_path, **wrong)
    with pytest.raises(ValueError, match="^TARGET: "):
        run([], tmp_path)


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "LARGE", 1 << 22)
    rates = {"fp16": (1.0, 7), "fp32": (3.0, 8), "fp64": (2.0, 9), "bf16": (4.0, 7)}
    monkeypatch.setattr(roofline, "_matmul_rate", lambda clock, dtype, device: rates[dtype])
    found = MEASURE_CEILINGS(("fp16", "bf16", "fp64", "fp32"), "cpu")
    assert [found[n].matmul for n in ("fp16", "bf16", "fp64", "fp32")] == [3.0, 4.0, 2.0, 3.0]
    assert found["fp16"].matmul_size == 8 and found["fp16"].matmul_note.startswith("in fp32: fp16 has ")
    assert not any(found[n].matmul_note for n in ("bf16", "fp64", "fp32"))
    ceilings = MEASURE_CEILINGS(("fp16",), "cpu")["fp16"]
    assert ceilings.bandwidth > 0 and ceilings.exps > 0
    task = measure.Work(flops=8.0, bytes=2.0, exps=3.0)
    assert roofline.Ceilings(2.0, 1, 1.0, 1.0, "").seconds(task) == 4.0
    assert roofline.Ceilings(8.0, 1, 1.0, 1.0, "").seconds(task) == 3.0
    assert roofline.Ceilings(8.0, 1, 0.5, 1.0, "").seconds(task) == 4.0
