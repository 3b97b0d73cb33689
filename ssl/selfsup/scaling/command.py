"""`selfsup scaling fit | predict | report`: what is typed, and what is printed."""

import math
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from selfsup.scaling.analyse import analyse
from selfsup.scaling.broken_form import analyse_broken
from selfsup.scaling.design import check_untrained
from selfsup.scaling.finding import Finding
from selfsup.scaling.isoflop_form import analyse_isoflop
from selfsup.scaling.predict import predict_axis, predict_plan, predict_run
from selfsup.scaling.repeated import analyse_repeats
from selfsup.scaling.result import Result, findings_json, read_result, write_json, write_result
from selfsup.scaling.show import show_prediction, show_result
from selfsup.scaling.solve import DELTA
from selfsup.scaling.speed import measured_flop_per_second
from selfsup.scaling.sweeps import best_learning_rates
from selfsup.scaling.table import Columns, Runs, read_table

Form = Literal["chinchilla", "tied", "kaplan", "repeats", "bnsl", "isoflop"]
Column = Annotated[str | None, tyro.conf.arg(metavar="COL")]
_N_AND_D = ("chinchilla", "tied", "kaplan")
_ONLY_FOR = {
    "--base": ("repeats",),
    "--delta": (*_N_AND_D, "repeats", "bnsl"),
    "--also-params": _N_AND_D,
    "--sigma": _N_AND_D,
    "--budget": (*_N_AND_D, "repeats", "isoflop"),
    "--unique": (*_N_AND_D, "repeats", "isoflop"),
    "--steps": (*_N_AND_D, "repeats", "isoflop"),
    "--warmup": (*_N_AND_D, "repeats", "isoflop"),
}


@dataclass(frozen=True)
class FitOptions:
    """What `selfsup scaling fit` is told."""

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """CSV, TSV or semicolons; one row a run, or several a run with --cluster."""
    loss: Annotated[str, tyro.conf.arg(metavar="COL")]
    """The loss; rows without one (NaN, diverged) are counted and left out."""
    params: Column = None
    """Parameters N (125M, 1.4e9 and 1,400,000 are read)."""
    samples: Column = None
    """Data processed D, repeats counted: tokens, images."""
    flops: Column = None
    """Of the whole training; without it 6 N D, without --samples D = C / (6 N)."""
    budget: Column = None
    """Nominal compute of an isoFLOP grid; without it, groups of runs that gaps in FLOPs separate, if there are any."""
    cluster: Column = None
    """The run of a row, where a run has several rows: they are resampled together."""
    unique: Column = None
    """Distinct samples, where data are repeated (--form repeats)."""
    lr: Column = None
    """Learning rate; of each (N, D) the best one is kept, and the sweep is judged."""
    steps: Column = None
    """Optimizer steps; short runs are told."""
    warmup: Column = None
    """Warm-up steps."""
    initial_loss: Column = None
    """Loss before training, with --vocab."""
    also_params: Column = None
    """Parameters counted otherwise; says what that changes."""
    sigma: Column = None
    """Measured standard deviation of a row's log loss; rows weigh 1 / sigma."""
    form: Form = "chinchilla"
    """bnsl takes one axis, one of --params, --samples, --flops."""
    where: tuple[str, ...] = ()
    """COLUMN=VALUE conditions on rows."""
    drop_highest: int = 0
    """Leave out so many of the highest losses."""
    flops_per: float | None = None
    """FLOPs per parameter and sample, in place of 6 or of what the table shows."""
    vocab: int | None = None
    """Size of the vocabulary; losses are held against its logarithm."""
    base: Annotated[Path | None, tyro.conf.arg(metavar="FIT")] = None
    """For --form repeats, a chinchilla fit (OUT of an earlier fit) as the law of fresh data."""
    delta: float = DELTA
    """Huber's threshold in log loss."""
    resamples: int = 1000
    """Of the bootstrap; 0 for none."""
    seed: int = 0
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """The result as a file, for predict and report."""


def main_fit(options: Annotated[FitOptions, tyro.conf.arg(name="")]) -> int:
    """Fits a scaling law to a table of runs, with intervals, a held-out error, and its doubts.

    Exit code 1 where the fit is refused as a ground for plans (the reasons are printed and in OUT).
    """
    _numbers(options)
    _axes(options)
    _unused(options)
    runs, before = _runs(options)
    result = _analysed(runs, options)
    result.warnings[:0] = findings_json(before)
    result.about["table"] = options.table.name
    result.about["command"] = "selfsup scaling fit " + shlex.join(sys.argv[3:])
    if options.json is not None:
        write_result(result, options.json)
    show_result(result)
    return 1 if result.refused else 0


def _runs(options: FitOptions) -> tuple[Runs, list[Finding]]:
    """The rows to fit, and what their selection found. The one axis of a bnsl law stands in `samples`."""
    columns = {item.name: getattr(options, item.name) for item in fields(Columns)}
    if options.form == "bnsl":
        columns |= {"params": None, "samples": _axis(options), "flops": None}
    runs = read_table(options.table, Columns(**columns), options.where, options.flops_per)
    if options.drop_highest:
        runs = _without_highest(runs, options.drop_highest)
    runs, said = best_learning_rates(runs)
    return runs, said + (check_untrained(runs, options.vocab) if options.vocab is not None else [])


def _analysed(runs: Runs, options: FitOptions) -> Result:
    resamples, seed, delta = options.resamples, options.seed, options.delta
    match options.form:
        case "repeats":
            base = None if options.base is None else read_result(options.base)
            return analyse_repeats(runs, base, resamples, seed, delta)
        case "bnsl":
            return analyse_broken(runs, _axis(options), resamples, seed, delta)
        case "isoflop":
            return analyse_isoflop(runs, resamples, seed)
        case _:
            return analyse(runs, options.form, resamples, seed, delta)


def _axis(options: FitOptions) -> str:
    """The one column of a bnsl law."""
    return options.params or options.samples or options.flops or ""


def _numbers(options: FitOptions) -> None:
    """Raises ValueError for a number out of its range, or one that wants another option."""
    _positive("--resamples", options.resamples, 0)
    _positive("--drop-highest", options.drop_highest, 0)
    _positive("--seed", options.seed, 0)
    if options.vocab is not None:
        _positive("--vocab", options.vocab, 2)
    for flag, value in (("--delta", options.delta), ("--flops-per", options.flops_per)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag}: expected a positive number, got {value:g}")
    if 0 < options.resamples < 100:
        raise ValueError(
            "--resamples: expected 0 or at least 100 (a 95% interval's ends are 2.5% of them), got "
            f"{options.resamples}"
        )
    if options.warmup is not None and options.steps is None:
        raise ValueError("--warmup: expected --steps too, of which it is a share")
    if options.initial_loss is not None and options.vocab is None:
        raise ValueError("--initial-loss: expected --vocab too, whose logarithm it is held against")


def _axes(options: FitOptions) -> None:
    """Raises ValueError where the columns are not those of the form."""
    given = [f"--{name}" for name in ("params", "samples", "flops") if getattr(options, name) is not None]
    if options.form == "bnsl":
        if len(given) != 1:
            raise ValueError(
                "--form bnsl has one axis: expected one of --params, --samples, --flops, got "
                f"{' '.join(given) or 'none'}"
            )
    elif options.params is None:
        raise ValueError(
            f"--form {options.form}: expected --params COL, the number of parameters of each run"
        )
    elif len(given) < 2:
        raise ValueError("expected --samples COL (tokens or images) or --flops COL, or both")


def _unused(options: FitOptions) -> None:
    """Raises ValueError for an option that the form does not use: nothing is ignored in silence."""
    for flag, forms in _ONLY_FOR.items():
        name = flag[2:].replace("-", "_")
        unset = DELTA if name == "delta" else None
        if getattr(options, name) != unset and options.form not in forms:
            raise ValueError(f"{flag}: is for --form {', '.join(forms)}, got {options.form}")


def _without_highest(runs: Runs, count: int) -> Runs:
    if count >= len(runs):
        raise ValueError(f"--drop-highest: expected fewer than the {len(runs)} usable rows, got {count}")
    keep = np.ones(len(runs), dtype=bool)
    keep[np.argsort(runs.loss)[len(runs) - count :]] = False
    return runs.take(keep, f"the {count} highest losses (--drop-highest)")


def _positive(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{flag}: expected at least {least}, got {value}")


def main_predict(
    *,
    fit: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    flops: float | None = None,
    hours: float | None = None,
    flop_per_second: float | None = None,
    utilisation: float = 0.4,
    unique_samples: float | None = None,
    params: float | None = None,
    samples: float | None = None,
    at: float | None = None,
    level: float = 0.95,
    rule: tuple[Literal["porian", "olmo", "steplaw"], ...] = (),
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """What to train with a compute: size, data, loss, each with its interval; and what missing the size costs.

    Args:
        fit: what selfsup scaling fit --json wrote.
        flops: the compute of one training, counted as in the fitted table.
        hours: the same as time, with --flop-per-second, else with this machine's measured speed.
        flop_per_second: what training reaches (samples/s times FLOPs per sample of a run); taken as it is.
        utilisation: with --hours alone: the share of the measured matrix products that training reaches.
        unique_samples: distinct samples that there are; more are repeats.
        params: with --samples, predicts the loss of that run instead of a plan.
        at: for a bnsl fit, the value of its axis.
        level: of the intervals.
        rule: with a plan, its learning rate and batch by these rules for language models in tokens.
        json: the prediction as a file.
    """
    if not 0 < level < 1:
        raise ValueError(f"--level: expected 0 < x < 1, got {level:g}")
    result = read_result(fit)
    said = []
    if (params is None) != (samples is None):
        raise ValueError("--params and --samples: expected both (the loss of that run) or neither (a plan)")
    ways = sum(way is not None for way in (flops, hours, params, at))
    if ways != 1:
        raise ValueError(
            f"expected one of --flops C, --hours T, --params N with --samples D, --at X; got {ways}"
        )
    if rule and flops is None and hours is None:
        raise ValueError("--rule: is for a plan, expected --flops C or --hours T")
    if at is not None:
        found = predict_axis(result, at, level)
    elif params is not None and samples is not None:
        found = predict_run(result, params, samples, unique_samples, level)
    else:
        if hours is not None:
            flops, said = _compute(hours, flop_per_second, utilisation)
        assert flops is not None
        found = predict_plan(result, flops, level, unique_samples, rule)
    found.notes[:0] = said
    if json is not None:
        write_json(asdict(found), json)
    show_prediction(found)


def _compute(hours: float, flop_per_second: float | None, utilisation: float) -> tuple[float, list[str]]:
    """FLOPs in so many hours, and where the speed comes from."""
    if not 0 < hours < math.inf:
        raise ValueError(f"--hours: expected a positive number, got {hours:g}")
    if flop_per_second is not None:
        if not 0 < flop_per_second < math.inf:
            raise ValueError(f"--flop-per-second: expected a positive number, got {flop_per_second:g}")
        return hours * 3600 * flop_per_second, [f"{hours:g} hours at {flop_per_second:.3g} FLOP/s as given"]
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation: expected 0 < x <= 1, got {utilisation:g}")
    peak = measured_flop_per_second()
    note = (
        f"{hours:g} hours at {utilisation:g} of {peak:.3g} FLOP/s, measured now in float32 matrix "
        "products on this CPU; a run's own "
        "samples/s times its FLOPs per sample, by --flop-per-second, is better"
    )
    return hours * 3600 * utilisation * peak, [note]


def main_report(
    *,
    fit: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    sweep: Annotated[Path | None, tyro.conf.arg(metavar="SWEEP")] = None,
) -> None:
    """Pictures of a fit (PNG and SVG) and one HTML page with everything.

    Args:
        fit: what selfsup scaling fit --json wrote.
        out: the folder; earlier pictures of the same names are replaced.
        sweep: the folder of selfsup scaling run whose table was fitted: what its plan expected stands beside what the
            fit found, the held-out runs beside their predictions, and every cell that gave no loss is named.
    """
    from selfsup.scaling.report import write_report
    from selfsup.scaling.sweep_report import lines, sections, summarise

    result = read_result(fit)
    parts = [] if sweep is None else [summarise(result, sweep)]
    made = f"<p>This page:</p><pre>selfsup scaling report {escape(shlex.join(sys.argv[3:]))}</pre>"
    for path in write_report(result, out, [made, *(section for part in parts for section in sections(part))]):
        print(path)
    for line in [line for part in parts for line in lines(part)]:
        print(line)
