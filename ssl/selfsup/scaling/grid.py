"""The cells of a sweep: which size is trained on how much data, with which learning rate and batch."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup.recipe import Recipe
from selfsup.scaling import law
from selfsup.scaling.ladder import Size, resized, sizes
from selfsup.scaling.mup_ladder import require_proportions, uses_mup
from selfsup.scaling.sweep_config import IsoFlop, MupRule, SweepConfig, Trunk, setting_of

OFF_TARGET = 0.01
"""A cell's C may miss its budget by this share."""


class Cell(NamedTuple):
    """One run. `params` and `flops` are by the sweep's conventions; `counts` holds all of them."""

    id: str
    role: str
    """grid, hold-out, repeat (another seed) or probe (another learning rate)."""
    size: str
    params: float
    samples: float
    flops: float
    budget: float | None
    steps: int
    batch: int
    lr: float
    seed: int
    counts: dict[str, float]
    recipe: dict[str, Any]
    trunk: str | None = None
    """The cell that this one branches off."""
    branch_step: int | None = None


class Made(NamedTuple):
    """Cells, and how many were left out by reason."""

    cells: list[Cell]
    left_out: dict[str, int]


def make_cells(base: Recipe, config: SweepConfig, prior: dict[str, float]) -> Made:
    """Every cell of the grid that meets the floors, then held-out ones, seeds and learning rates.

    prior: E, A, B, alpha, beta, where isoFLOP profiles are centred. Raises ValueError for a rule for language on images,
    for muP where it does not hold, and where nothing is left.
    """
    if config.rule.name in ("porian", "olmo", "steplaw") and base.encoder.reads != "text":
        raise ValueError(f"rule.name: {config.rule.name} is for language models; expected fixed or power")
    if isinstance(config.rule, MupRule) and base.optim.name != "adamw":
        raise ValueError(f"rule.name: mup is for optim.name adamw, got {base.optim.name}; expected fixed or power")
    ladder, left_out = sizes(base, config.ladder), Counter()
    if uses_mup(base, config.rule):
        require_proportions(base, ladder)
    if isinstance(config.grid, IsoFlop):
        cells = _isoflop(base, config, ladder, prior, left_out)
    elif isinstance(config.grid, Trunk):
        cells = _trunks(base, config, ladder, left_out)
    else:
        wanted = [(size, samples, None, "grid") for size in ladder for samples in sorted(config.grid.samples)]
        cells = _kept(base, config, wanted, left_out)
    if not cells:
        said = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(f"grid: no cell is left: {said}")
    cells += _seeds(base, config, cells, prior) + _probes(base, config, cells)
    return Made(cells, dict(left_out))


def nearest(ladder: Sequence[Size], config: SweepConfig, prior: dict[str, float], budget: float) -> list[Size]:
    """The ladder in the order of how near to the best loss at a budget each size is, by the prior."""

    def loss(size: Size) -> float:
        samples = budget / flops_per_sample(size, config) * size.account.unit
        return float(law.chinchilla(**prior, params=params_of(size, config), samples=samples))

    best = min(ladder, key=loss)
    centre = np.log(params_of(best, config))
    return sorted(ladder, key=lambda size: abs(np.log(params_of(size, config)) - centre))


def params_of(size: Size, config: SweepConfig) -> float:
    """N by the sweep's convention."""
    return float(getattr(size.account, config.params))


def flops_per_sample(size: Size, config: SweepConfig) -> float:
    """FLOPs of a row or an image by the sweep's convention."""
    return float(getattr(size.account, config.flops))


def _isoflop(
    base: Recipe, config: SweepConfig, ladder: list[Size], prior: dict[str, float], left_out: Counter
) -> list[Cell]:
    grid = config.grid
    assert isinstance(grid, IsoFlop)
    cells: list[Cell] = []
    levels = ((grid.budgets, grid.per_budget, "grid"), (grid.hold_out, grid.hold_out_sizes, "hold-out"))
    for budgets, count, role in levels:
        for budget in sorted(budgets):
            found: list[Cell] = []
            for size in nearest(ladder, config, prior, budget):  # past those that the floors leave out
                if len(found) < count:
                    samples = budget / flops_per_sample(size, config) * size.account.unit
                    found += _kept(base, config, [(size, samples, budget, role)], left_out)
            if len(found) < count:
                left_out[f"of the sizes asked for a budget ({count}): the ladder has too few above the floors"] += (
                    count - len(found)
                )
            cells += sorted(found, key=lambda cell: cell.params)
    return cells


def _kept(base: Recipe, config: SweepConfig, wanted: list[tuple], left_out: Counter) -> list[Cell]:
    cells = []
    for size, samples, budget, role in wanted:
        cell = make_cell(base, config, size, samples, budget, role)
        if cell.steps < config.floors.steps:
            left_out[f"cells below floors.steps {config.floors.steps}"] += 1
        elif cell.samples / cell.params < config.floors.ratio:
            left_out[f"cells below floors.ratio {config.floors.ratio:g}"] += 1
        elif budget is not None and abs(cell.flops / budget - 1) > OFF_TARGET:
            left_out[f"cells whose C is off the budget by over {OFF_TARGET:.0%}: so few steps"] += 1
        else:
            cells.append(cell)
    return cells


def make_cell(
    base: Recipe, config: SweepConfig, size: Size, samples: float, budget: float | None, role: str
) -> Cell:
    """The run of one size on so much data, to the nearest step, as the rule sets it."""
    setting = setting_of(config.rule, size.account, samples)
    batch = max(1, round(setting.batch / size.account.unit))
    steps = max(1, round(samples / size.account.unit / batch))
    return cell_of(base, config, size, role, budget, steps, batch, setting.lr, {})


def cell_of(
    base: Recipe, config: SweepConfig, size: Size, role: str, budget: float | None, steps: int, batch: int, lr: float,
    schedule: dict[str, Any],
) -> Cell:  # fmt: skip
    """One run in all its parts. schedule: further keys of its optimizer."""
    optim = {
        "steps": steps, "batch_size": batch, "base_lr": lr, "lr_scaling": "none",
        "min_lr": base.optim.min_lr / base.optim.peak_lr * lr, **schedule,
    }  # fmt: skip
    if isinstance(config.rule, MupRule):
        optim["mup_base_width"] = config.rule.base_width
    recipe = resized(base, {**size.changes, "optim": optim, "seed": config.seed, "run": _quiet(steps)})
    content = recipe.model_dump(mode="json")
    del content["run"]["dir"]
    seen, account = steps * batch, size.account
    counts = {
        "params_matrices": account.matrices, "params_all": account.all, "params_no_embedding": account.no_embedding,
        "flops_counted": account.counted * seen, "flops_parameters": account.parameters * seen,
    }  # fmt: skip
    return Cell(
        digest(content, config), role, size.name, params_of(size, config), float(seen * account.unit),
        counts[f"flops_{config.flops}"], budget, steps, batch, lr, config.seed, counts, content,
    )  # fmt: skip


def digest(recipe: dict[str, Any], config: SweepConfig, *rest: Any) -> str:
    """The name of a cell: a hash of all that its result depends on."""
    parts = [
        {key: _given(value) for key, value in recipe.items() if key != "run"},
        config.held_out.of(recipe["objective"]["name"]), *rest,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _given(section: Any) -> Any:
    """Without keys that are none: a key that a later version adds, and that is not used, changes no name."""
    return {k: v for k, v in section.items() if v is not None} if isinstance(section, dict) else section


def _quiet(steps: int) -> dict[str, Any]:
    """A cell runs in one thread, reads its own data, draws nothing, and can go on from a quarter of its way."""
    return {
        "threads": 1, "workers": 0, "picture_every": 0, "monitor_every": 0, "histogram_every": 0,
        "log_every": max(1, steps // 50), "checkpoint_every": max(1, -(-steps // 4)),
    }  # fmt: skip


def _trunks(base: Recipe, config: SweepConfig, ladder: list[Size], left_out: Counter) -> list[Cell]:
    """Of each size the longest run, and the shorter ones as branches of it.

    Raises ValueError for another schedule than wsd, whose constant part is what the runs share.
    """
    assert isinstance(config.grid, Trunk)
    if base.optim.schedule != "wsd":
        raise ValueError(f"grid.name: trunk needs optim.schedule wsd in {config.recipe}, got {base.optim.schedule}")
    cells, most = [], max(config.grid.samples)
    multiples = sorted({round(samples / min(config.grid.samples)) for samples in config.grid.samples})
    for size in ladder:
        longest = make_cell(base, config, size, most, None, "grid")
        short = round(longest.steps / multiples[-1])
        if short < config.floors.steps:
            left_out[f"sizes whose shortest branch is below floors.steps {config.floors.steps}"] += 1
        else:
            cells += _branches(base, config, size, longest, short, multiples)
    return cells


def _branches(
    base: Recipe, config: SweepConfig, size: Size, longest: Cell, short: int, multiples: list[int]
) -> list[Cell]:
    """The trunk, then its branches: with one warm-up, in steps, and decays that begin at multiples of the same step,
    where the trunk keeps its checkpoints."""
    decay, warmup = round(short * base.optim.decay_fraction), round(short * base.optim.warmup_fraction)
    stem = short - decay
    made = []
    for multiple in multiples:
        steps = short * multiple
        schedule = {"warmup_fraction": warmup / steps, "decay_fraction": decay * multiple / steps}
        made.append(cell_of(base, config, size, "grid", None, steps, longest.batch, longest.lr, schedule))
    *branches, trunk = made
    trunk.recipe["run"].update(checkpoint_every=stem, keep_checkpoints=trunk.steps // stem + 2)
    found = [trunk]
    for multiple, branch in zip(multiples, branches):
        # Where it leaves: named in its hash, though its result is that of a run of its own.
        name = digest(branch.recipe, config, {"trunk": trunk.id, "step": stem * multiple})
        found.append(branch._replace(id=name, trunk=trunk.id, branch_step=stem * multiple))
    return found


def _seeds(base: Recipe, config: SweepConfig, cells: list[Cell], prior: dict[str, float]) -> list[Cell]:
    """The best cell, by the prior, at the middle compute of the grid, with other seeds."""
    grid = [cell for cell in cells if cell.role == "grid"]
    if not config.repeat_seeds:
        return []
    levels = sorted({cell.budget or cell.flops for cell in grid})
    middle = [cell for cell in grid if (cell.budget or cell.flops) == levels[len(levels) // 2]]
    best = min(middle, key=lambda cell: float(law.chinchilla(**prior, params=cell.params, samples=cell.samples)))
    return [_again(base, config, best, "repeat", {"seed": seed}) for seed in config.repeat_seeds]


def _probes(base: Recipe, config: SweepConfig, cells: list[Cell]) -> list[Cell]:
    """The smallest and the largest size of the least compute, with other learning rates."""
    grid = [cell for cell in cells if cell.role == "grid"]
    level = min(cell.budget or cell.flops for cell in grid)
    least = [cell for cell in grid if (cell.budget or cell.flops) <= level * (1 + OFF_TARGET)]
    ends = {cell.size: cell for cell in (min(least, key=_by_params), max(least, key=_by_params))}
    found = []
    for cell in ends.values():
        for factor in config.probe_lr:
            optim = {"base_lr": cell.lr * factor, "min_lr": cell.recipe["optim"]["min_lr"] * factor}
            found.append(_again(base, config, cell, "probe", {"optim": optim})._replace(lr=cell.lr * factor))
    return found


def _by_params(cell: Cell) -> float:
    return cell.params


def _again(base: Recipe, config: SweepConfig, cell: Cell, role: str, changes: dict[str, Any]) -> Cell:
    """A cell trained anew from its first step with something changed."""
    recipe = resized(base, {**cell.recipe, "run": {**cell.recipe["run"], "dir": base.run.dir}}).model_dump(mode="json")
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    del recipe["run"]["dir"]
    return cell._replace(
        id=digest(recipe, config), role=role, recipe=recipe, seed=changes.get("seed", cell.seed), trunk=None,
        branch_step=None,
    )  # fmt: skip
