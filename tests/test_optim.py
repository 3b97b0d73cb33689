"""Schedules, learning rate and weight averages against closed forms; AdamW against the paper's update by hand."""

import math

import pytest
import torch
import yaml
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from selfsup.config import dump_yaml, validate
from selfsup.ema import Ema
from selfsup.lars import Lars
from selfsup.optim import AdamWConfig, LarsConfig, OptimConfig, build_optimizer, require_finite
from selfsup.recipe import Recipe
from selfsup.schedule import warmup_cosine, warmup_linear, warmup_stable_decay


def test_schedule_closed_form():
    rates = [warmup_cosine(step, 100, 2.0, 0.1, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(0.5 + 1.5 / 2)
    assert rates[99] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 89 / 90)) / 2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


SCALINGS = ("linear", "sqrt", "none")
SCHEDULES = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "wsd": lambda *course: warmup_stable_decay(*course, 0.2),
}


def theirs(name: str, steps: int, warmup: int) -> list[float]:
    """The rates of transformers' schedules with peak 1 and minimum 0."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if name == "wsd":
        decay = round(0.2 * steps)
        made = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps, decay_type="1-sqrt")
    elif name == "linear":
        made = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        made = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    return [made.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps,fraction", [(100, 0.1), (37, 0.0), (250, 0.04)])
def test_schedules_are_those_of_transformers(name, steps, fraction):
    """After the warm-up, which there begins with a step that learns nothing: theirs lags by one step."""
    warmup, schedule = round(steps * fraction), SCHEDULES[name]
    rates, expected = (
        [schedule(s, steps, 1.0, fraction, 0.0) for s in range(steps)],
        theirs(name, steps, warmup),
    )
    assert rates[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)
    assert rates[:warmup] == pytest.approx([*expected[1:warmup], 1.0][:warmup], abs=1e-12)
    late = [schedule(min(s + 1, steps - 1), steps, 1.0, fraction, 0.0) for s in range(steps)]
    assert late[warmup:] != pytest.approx(expected[warmup:], abs=1e-3)  # off by one is seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_edges(name):
    schedule = SCHEDULES[name]
    assert schedule(0, 1, 1.0, 0.0, 0.0) == 1.0  # one step
    assert schedule(5, 5, 1.0, 0.0, 0.25) == pytest.approx(0.25)  # where it ends
    assert schedule(0, 50, 1.0, 0.1, 0.0) == pytest.approx(1 / 5) and schedule(49, 50, 1.0, 0.1, 0.0) > 0
    assert schedule(5, 50, 3.0, 0.1, 0.5) == 3.0 == schedule(4, 50, 3.0, 0.1, 0.5)
    for steps in range(1, 12):
        for fraction in (0.0, 0.05, 0.3, 0.5, 0.8):
            rates = [schedule(s, steps, 2.0, fraction, 0.1) for s in range(steps)]
            top = rates.index(max(rates))
            assert all(0.1 < rate <= 2.0 for rate in rates) and max(rates) == 2.0
            assert rates[: top + 1] == sorted(rates[: top + 1])
            assert rates[top:] == sorted(rates[top:], reverse=True)


def test_schedules_that_are_all_warm_up_or_all_decay():
    for schedule in (warmup_cosine, warmup_linear):
        assert [schedule(s, 5, 1.0, 1.0, 0.0) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [warmup_stable_decay(s, 5, 1.0, 1.0, 0.0, 0.0) for s in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    assert {warmup_stable_decay(s, 5, 1.0, 0.0, 0.0, 0.0) for s in range(5)} == {1.0}
    rates = [warmup_stable_decay(s, 4, 1.0, 0.0, 0.0, 1.0) for s in range(4)]
    assert rates == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])
    # 3 steps in two halves: both round to 2, the warm-up keeps its own
    assert [warmup_stable_decay(s, 3, 1.0, 0.5, 0.0, 0.5) for s in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("name,mean", [("cosine", 0.5), ("linear", 0.5), ("wsd", 8 / 9 + 1 / 9 / 3)])
def test_integral_of_a_schedule(name, mean):
    """Of its share after the warm-up, a tenth of the steps: 1/2 for a half cosine and a line, 1/3 for 1 - sqrt."""
    steps, peak, low = 90_000, 3.0, 1.0
    if name == "wsd":
        rates = [warmup_stable_decay(s, steps, peak, 0.1, low, 0.1) for s in range(steps)]
    else:
        rates = [SCHEDULES[name](s, steps, peak, 0.1, low) for s in range(steps)]
    assert sum(rates[9000:]) / 81_000 == pytest.approx(low + (peak - low) * mean, rel=1e-4)
    assert sum(rates[:9000]) / 9000 == pytest.approx(peak / 2, rel=1e-3)


def test_up_to_its_decay_wsd_does_not_depend_on_the_length_of_the_run():
    short = AdamWConfig(schedule="wsd", steps=100, warmup_fraction=0.1)
    long = AdamWConfig(schedule="wsd", steps=400, warmup_fraction=0.025)
    assert [short.lr(s) for s in range(80)] == [long.lr(s) for s in range(80)]
    assert short.lr(80) == short.peak_lr > short.lr(81) and long.lr(319) == long.peak_lr


def test_the_schedule_is_chosen_by_name_and_its_shares_are_checked():
    for name, schedule in SCHEDULES.items():
        config = AdamWConfig(schedule=name, steps=60, base_lr=1e-3, warmup_fraction=0.2, min_lr=1e-5)
        assert [config.lr(s) for s in range(60)] == [schedule(s, 60, 1e-3, 0.2, 1e-5) for s in range(60)]
    assert AdamWConfig().schedule == "cosine"
    validate(AdamWConfig, {"schedule": "wsd", "warmup_fraction": 0.7, "decay_fraction": 0.3})
    with pytest.raises(
        ValueError, match="decay_fraction: expected at most 0.1, what warmup_fraction leaves, got"
    ):
        validate(AdamWConfig, {"schedule": "wsd", "warmup_fraction": 0.9})
    with pytest.raises(ValueError, match="decay_fraction: schedule cosine has no such phase"):
        validate(AdamWConfig, {"decay_fraction": 0.3})
    with pytest.raises(ValueError, match="schedule: expected one of 'cosine', 'linear' or 'wsd', got 'step'"):
        validate(AdamWConfig, {"schedule": "step"})


def test_learning_rate_scales_with_the_global_batch():
    assert AdamWConfig(base_lr=1.5e-4, batch_size=4096).peak_lr == pytest.approx(2.4e-3)
    with pytest.raises(ValueError, match="min_lr: expected at most the peak"):
        validate(AdamWConfig, {"min_lr": 1.0})


def test_lr_scaling():
    for batch, linear, root in ((256, 1.0, 1.0), (1024, 4.0, 2.0), (64, 0.25, 0.5)):
        for config in (AdamWConfig, LarsConfig):
            peaks = {how: config(base_lr=0.5, batch_size=batch, lr_scaling=how).peak_lr for how in SCALINGS}
            assert peaks == pytest.approx({"linear": 0.5 * linear, "sqrt": 0.5 * root, "none": 0.5})
    assert AdamWConfig(batch_size=512) == AdamWConfig(batch_size=512, lr_scaling="linear")
    simclr = LarsConfig(base_lr=1.2, batch_size=4096, lr_scaling="sqrt")
    assert simclr.peak_lr == pytest.approx(0.075 * math.sqrt(4096)) == pytest.approx(4.8)
    assert max(simclr.lr(s) for s in range(simclr.steps)) == pytest.approx(4.8)


def recipe(**optim) -> Recipe:
    return validate(Recipe, {"data": {"shards": "d"}, "run": {"dir": "r"}, "optim": optim})


def test_the_optimizer_is_chosen_by_name():
    model = small_model()
    for name, kind, config in (("adamw", torch.optim.AdamW, AdamWConfig), ("lars", Lars, LarsConfig)):
        chosen = recipe(name=name, weight_decay=0.2).optim
        assert chosen == config(weight_decay=0.2) and isinstance(chosen, OptimConfig)
        optimizer = build_optimizer(chosen, model)
        assert type(optimizer) is kind and [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
        names = [group["param_names"] for group in optimizer.param_groups]
        assert names == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]
        assert {group["lr"] for group in optimizer.param_groups} == {chosen.peak_lr}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        sized = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        assert len(sized) == chosen.moments * 4  # what --dry-run counts
        assert validate(Recipe, yaml.safe_load(dump_yaml(recipe(name=name)))) == recipe(name=name)
    assert recipe().optim == recipe(name="adamw").optim == AdamWConfig()


@pytest.mark.parametrize(
    "optim,line",
    [
        ({"momentum": 0.8}, "optim.momentum: unknown key; it belongs to optim.name lars"),
        ({"name": "lars", "betas": [0.9, 0.9]}, "optim.betas: unknown key; it belongs to optim.name adamw"),
        ({"name": "sgd"}, "optim: expected name to be one of 'adamw', 'lars', got"),
        ({"lr_scaling": "root"}, "optim.lr_scaling: expected one of 'linear', 'sqrt' or 'none', got 'root'"),
        ({"name": "lars", "momentum": 1}, "optim.momentum: expected 0 <= x < 1, got 1"),
        ({"name": "lars", "trust_coefficient": 0}, "optim.trust_coefficient: expected 0 < x, got 0"),
        ({"name": "lars", "momentun": 0.8}, "optim.momentun: unknown key; perhaps you meant optim.momentum"),
        ({"name": "lars", "min_lr": 1}, "optim: min_lr: expected at most the peak 0.3, got 1"),
    ],
)
def test_faults_name_the_optimizer_a_key_belongs_to(optim, line):
    with pytest.raises(ValueError) as fault:
        recipe(**optim)
    assert str(fault.value).startswith(line)


def test_adamw_step_by_hand():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone().double(), layer.bias.detach().clone().double()
    config = AdamWConfig(base_lr=0.256, batch_size=100, weight_decay=0.3, betas=(0.8, 0.9))
    optimizer = build_optimizer(config, layer)
    lr, moments = config.peak_lr, {}
    for t in (1, 2, 3):
        layer.zero_grad()
        layer(torch.randn(5, 3)).square().sum().backward()
        for name, value, decay in (("weight", weight, 0.3), ("bias", bias, 0.0)):
            g = getattr(layer, name).grad.double()
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            moments[name] = (m, v)
            value.mul_(1 - lr * decay)
            value.sub_(lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8))
        optimizer.step()
    assert torch.allclose(layer.weight.double(), weight, rtol=1e-5) and torch.allclose(
        layer.bias.double(), bias, rtol=1e-5
    )


def small_model() -> torch.nn.Module:
    """A trained layer, a frozen one, and batch norm, whose buffers are floats and a whole number."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_in_closed_form(decay):
    model = small_model()
    ema, history = Ema(model, decay), []
    assert all(torch.equal(ema.tensors[k], v) for k, v in model.state_dict().items())
    for step in range(1, 8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))  # the frozen ones too, as an EMA target's are
        model(torch.randn(5, 4))
        ema.update(model, step)
        history.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        n = len(history)
        shares = [(1 - decay) * decay ** (n - i) / (1 - decay**n) for i in range(1, n + 1)]
        assert sum(shares) == pytest.approx(1.0)
        for name, value in ema.tensors.items():
            if name in ("0.weight", "0.bias", "1.weight", "1.bias"):
                exact = sum(share * past[name].double() for share, past in zip(shares, history, strict=True))
                assert value.dtype == torch.float32
                torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, history[-1][name]), name
    assert ema.tensors["1.num_batches_tracked"] == 7
    assert not any(v.requires_grad for v in ema.tensors.values())


def test_a_tied_weight_is_averaged_under_both_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema, past = Ema(model, 0.5), []
    for step in (1, 2):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update(model, step)
        past.append(model[0].weight.detach().clone())
    expected = past[0] / 3 + past[1] * 2 / 3
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(ema.tensors[name], expected)


def test_training_does_not_see_the_average():
    model = small_model()
    ema = Ema(model, 0.9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ema.update(model, 1)
    for value in ema.tensors.values():
        value.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_average_takes_over_saved_tensors_of_its_own_shapes_only():
    ema = Ema(small_model(), 0.9)
    saved = {k: v + 1 for k, v in ema.tensors.items()}
    ema.load(saved)
    assert all(torch.equal(ema.tensors[k], saved[k]) for k in saved)
    for wrong in ({**saved, "0.bias": torch.zeros(2)}, {k: v for k, v in saved.items() if k != "0.bias"}):
        with pytest.raises(
            ValueError, match=r"averaged weights: 1 tensors do not fit this model, first 0\.bias"
        ):
            ema.load(wrong)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_lost_run_stops(loss):
    require_finite(1.0, 3)
    with pytest.raises(ValueError, match="step 3: stopped without saving"):
        require_finite(loss, 3)
