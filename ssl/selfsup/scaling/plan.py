"""A plan: the cells of a sweep, what they would cost, and what a law fitted to them is expected to know."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.recipe import Recipe, load_recipe
from selfsup.scaling.finding import split
from selfsup.scaling.grid import Cell, make_cell, make_cells
from selfsup.scaling.ladder import sizes, vocabulary
from selfsup.scaling.mup_ladder import depths_of, uses_mup
from selfsup.scaling.result import Result, findings_json, read_result, write_json
from selfsup.scaling.simulate import Design, Expected, judge, propose, simulate
from selfsup.scaling.sweep_config import IsoFlop, SweepConfig, load_sweep
from selfsup.scaling.timing import hours_of

VERSION = 1
PROPOSALS = 3
LAW = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Plan:
    """What `selfsup scaling run` reads.

    expected: intervals of a and of the loss at the target. hours: CPU-hours of each cell. proposals: cells not in
    the plan that would tell most an hour, with the expected deviation of the target's log loss once they are run.
    """

    config: dict[str, Any]
    objective: str
    unit: str
    vocab: int | None
    prior: dict[str, float]
    prior_from: str
    cells: list[dict[str, Any]]
    left_out: dict[str, int]
    expected: dict[str, Any]
    hours: dict[str, float]
    timed: str
    warnings: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    proposals: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""

    def as_cells(self) -> list[Cell]:
        return [Cell(**cell) for cell in self.cells]


def fitted(cell: Cell) -> bool:
    """Whether a cell is one that the law is fitted to; held-out ones test it, probes tell of the learning rate."""
    return cell.role in ("grid", "repeat")


def design_of(cells: list[Cell]) -> Design:
    """The cells' N, D, C; a trunk and its branches are one cluster."""
    names = [cell.trunk or cell.id for cell in cells]
    cluster = np.unique(names, return_inverse=True)[1].astype(np.int64)
    params, samples, flops = np.array([(cell.params, cell.samples, cell.flops) for cell in cells]).T
    return Design(params, samples, flops, cluster)


def make_plan(path: Path, pilot: Path | None = None, flop_per_second: float | None = None) -> Plan:
    """The plan of a sweep's YAML file.

    pilot: a chinchilla fit (`selfsup scaling fit --json`) of runs made before: the grid is centred on its optimum and
    simulated under its draws, in place of the prior. flop_per_second: what training reaches, in place of timed steps.
    Raises ValueError for whatever the user can mend.
    """
    config = load_sweep(path)
    base = load_recipe(path.parent / config.recipe, [])
    config.held_out.check(base.objective.name)
    prior, source, draws = _prior(config, pilot)
    made = make_cells(base, config, prior)
    cells = [cell for cell in made.cells if fitted(cell)]
    if flop_per_second is None:
        hours, speeds = hours_of(made.cells)
        rates = {key.partition(",")[0]: speed.flop_per_second for key, speed in speeds.items()}
        timed = "timed here, one thread: " + ", ".join(f"{k} {v / 1e9:.3g} GFLOP/s" for k, v in rates.items())
    else:
        rates, timed = {}, f"{flop_per_second:.4g} FLOP/s as given"
        hours = {cell.id: cell.counts["flops_counted"] / flop_per_second / 3600 for cell in made.cells}
    target = config.target or max(getattr(config.grid, "hold_out", ()), default=10 * max(c.flops for c in cells))
    design = design_of(cells)
    expected = simulate(design, prior, config.noise, target, draws=draws)
    budget = np.array([cell.budget for cell in cells]) if isinstance(config.grid, IsoFlop) else None
    steps = np.array([float(cell.steps) for cell in cells])
    findings = judge(design, expected, prior, budget, steps)
    if uses_mup(base, config.rule):
        findings = [*findings, *depths_of(config.ladder)]
    warnings, refused = split(findings)
    rate = flop_per_second or float(np.median(list(rates.values())))
    proposals = _proposals(base, config, made.cells, design, prior, target, rates, rate)
    return Plan(
        config.model_dump(mode="json"), base.objective.name, base.throughput[0], vocabulary(base), prior, source,
        [cell._asdict() for cell in made.cells], made.left_out, _expected(expected, config.noise), hours, timed,
        findings_json(warnings), findings_json(refused), proposals,
    )  # fmt: skip


def _prior(config: SweepConfig, pilot: Path | None) -> tuple[dict[str, float], str, dict[str, list[float]] | None]:
    """The law to centre on and to simulate under, where it is from, and its draws."""
    if pilot is None:
        return config.prior.model_dump(), "the config's prior", None
    result: Result = read_result(pilot)
    if result.form != "chinchilla":
        raise ValueError(f"--pilot {pilot}: expected a fit of --form chinchilla, got {result.form}")
    values = {name: result.coefficients[name] for name in LAW}
    if min(values["A"], values["B"]) <= 0:
        raise ValueError(f"--pilot {pilot}: its law does not depend on N or D (A {values['A']:g}, B {values['B']:g})")
    said = f"{pilot.name}, " + ("refused as a ground for plans, but nearer" if result.refused else "a fit of runs")
    return values, said, result.draws or None


def _expected(expected: Expected, noise: float) -> dict[str, Any]:
    content = {key: value for key, value in expected._asdict().items() if key != "errors"}
    return {**content, "noise": noise, "simulations": expected.errors.shape[1]}


def _proposals(
    base: Recipe, config: SweepConfig, cells: list[Cell], design: Design, prior: dict[str, float], target: float,
    rates: dict[str, float], rate: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The best cells that are not in the plan: of every size at every compute that the plan has."""
    levels = sorted({cell.budget or cell.flops for cell in cells})
    have = {cell.id for cell in cells}
    found = []
    for size in sizes(base, config.ladder):
        for level in levels:
            per = float(getattr(size.account, config.flops))
            cell = make_cell(base, config, size, level / per * size.account.unit, level, "proposed")
            fine = cell.steps >= config.floors.steps and cell.samples / cell.params >= config.floors.ratio
            if fine and cell.id not in have:
                found.append(cell)
    if not found:
        return []
    hours = np.array([cell.flops / rates.get(cell.size, rate) / 3600 for cell in found])
    best = propose(design, design_of(found), hours, prior, config.noise, target, PROPOSALS)
    return [
        {"size": found[p.index].size, "flops": found[p.index].flops, "hours": float(hours[p.index]), "sd": p.sd}
        for p in best
    ]


def write_plan(plan: Plan, path: Path) -> None:
    """Raises ValueError where the file cannot be written."""
    write_json({"version": VERSION, **asdict(plan)}, path)


def read_plan(path: Path) -> Plan:
    """A file that `selfsup scaling plan --json` wrote. Raises ValueError for another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ValueError(f"{path}: cannot read the plan: {reason}") from None
    names = set(Plan.__dataclass_fields__)
    if not isinstance(content, dict) or content.get("version") != VERSION or not names <= content.keys():
        raise ValueError(f"{path}: not a plan; expected what selfsup scaling plan CONFIG --json OUT writes")
    return Plan(**{name: content[name] for name in names})


def show_plan(plan: Plan) -> None:
    """The plan for people."""
    cells, expected = plan.as_cells(), plan.expected
    total = sum(plan.hours.values())
    print(
        f"{len(cells)} cells of {plan.objective}, {sum(c.flops for c in cells):.3g} FLOPs, {total:.3g} CPU-hours "
        f"({plan.timed})\n  N: {plan.config['params']}, C: {plan.config['flops']} FLOPs, D: {plan.unit}"
    )
    floors = plan.config["floors"]
    print(f"  floors: {floors['steps']} steps, D/N {floors['ratio']:g}; centred by {plan.prior_from}")
    for reason, count in plan.left_out.items():
        print(f"  left out: {count} {reason}")
    print(f"\n{'cell':12}  {'role':8} {'size':>10} {'N':>9} {'D':>9} {'D/N':>7} {'C':>9} {'steps':>7} {'batch':>5} "
          f"{'lr':>8} {'hours':>8}")  # fmt: skip
    for cell in cells:
        print(
            f"{cell.id:12}  {cell.role:8} {cell.size:>10} {cell.params:9.4g} {cell.samples:9.4g} "
            f"{cell.samples / cell.params:7.3g} {cell.flops:9.4g} {cell.steps:7} {cell.batch:5} {cell.lr:8.3g} "
            f"{plan.hours[cell.id]:8.2g}"
        )
    (low, high), (under, over) = expected["a_interval"], expected["loss_interval"]
    print(
        f"\nexpected of a law fitted to them ({expected['simulations']} simulations, noise {expected['noise']:g} of log "
        f"loss):\n  a {low:.3f} to {high:.3f} about {expected['a']:.3f} (95%)\n  loss at {expected['target']:.3g} FLOPs "
        f"{under:.4g} to {over:.4g} about {expected['loss']:.4g}, at N = {expected['params']:.3g}"
    )
    for proposal in plan.proposals:
        print(
            f"  next best: {proposal['size']} at {proposal['flops']:.3g} FLOPs, {proposal['hours']:.2g} CPU-hours: the "
            f"target's deviation becomes {proposal['sd']:.2%}"
        )
    for title, findings in (("warnings", plan.warnings), ("REFUSED, it cannot identify the law", plan.refused)):
        if findings:
            print(f"\n{title}:")
            for found in findings:
                print(f"  - {found['check']}: {found['text']}")
