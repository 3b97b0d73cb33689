"""Pictures of a fit: isoFLOP curves, approaches against each other, residuals, the prediction band, and what is not
identified. Each function draws one Result; `figures` takes those that apply to its form."""

from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfsup.scaling.cost import Cost
from selfsup.scaling.isoflop import frontier
from selfsup.scaling.optimum import optimum
from selfsup.scaling.result import Result, loss_at

PARAMETRIC = ("chinchilla", "tied", "kaplan")
_BAND = (0.025, 0.975)
_MANY = 400


def figures(result: Result) -> dict[str, Figure]:
    """{name: figure}; names are file names without their ending."""
    draw: dict[str, Callable[[Axes, Result], None]] = {}
    if result.profiles:
        draw["isoflop"] = isoflop_curves
    if result.form in PARAMETRIC or result.form == "isoflop":
        draw["approaches"] = approaches
    if result.form != "isoflop":
        draw["residuals"] = residuals
    draw["prediction"] = prediction_bnsl if result.form == "bnsl" else prediction
    if result.form == "repeats":
        del draw["prediction"]
    if result.draws:
        draw["identified"] = identified
    if result.about.get("profiles"):
        draw["profiles"] = profiles
    made = {}
    for name, function in draw.items():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        function(figure.subplots(), result)
        made[name] = figure
    return made


def _colours(values: np.ndarray) -> np.ndarray:
    """A colour of each value by its logarithm."""
    logs = np.log(values)
    span = max(float(np.ptp(logs)), 1e-9)
    return colormaps["viridis"](0.9 * (logs - logs.min()) / span)


def _along_optimum(result: Result, part: str, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The optimal `part` (params or loss) at each compute, and its 95% band, (k, 2), of the draws that
    have one; nan where none is finite."""
    cost, line, band = Cost(*result.about["cost"]), [], []
    for flops in grid:
        line.append(float(getattr(optimum(result.form, result.coefficients, flops, cost), part)))
        drawn = getattr(optimum(result.form, result.values(), flops, cost), part)
        drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
        band.append(np.quantile(drawn, _BAND) if len(drawn) else [np.nan, np.nan])
    found = np.array(line)
    return np.where(np.isfinite(found) & (found > 0), found, np.nan), np.array(band)


def isoflop_curves(axes: Axes, result: Result) -> None:
    """Loss against N of each budget, the parametric law as lines, optima by parabola as crosses."""
    colours = _colours(np.array([profile["budget"] for profile in result.profiles]))
    for profile, colour in zip(result.profiles, colours):
        n, d = np.array(profile["params"]), np.array(profile["samples"])
        axes.plot(n, profile["loss"], "o", ms=3.5, color=colour, label=f"{profile['budget']:.2g}")
        if result.form in PARAMETRIC:
            slope, height = np.polyfit(np.log(n), np.log(d), 1)
            grid = np.geomspace(n.min(), n.max(), 60)
            data = np.exp(height + slope * np.log(grid))
            axes.plot(
                grid, loss_at(result.form, result.coefficients, params=grid, samples=data), lw=1, color=colour
            )
        if profile["parabola"] is not None and not profile["outside"]:
            axes.plot(profile["parabola"], profile["parabola_loss"], "x", ms=7, color=colour)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss")
    law = "lines: the law; " if result.form in PARAMETRIC else ""
    axes.set_title(f"isoFLOP curves ({law}crosses: minima of parabolas)", fontsize=10)
    shown = axes.get_legend_handles_labels()
    step = max(1, len(shown[0]) // 10)
    axes.legend(shown[0][::step], shown[1][::step], title="FLOPs", fontsize=7, title_fontsize=7)


def approaches(axes: Axes, result: Result) -> None:
    """The optimal N against compute, by the law with its band, by parabolas and by Akima."""
    low, high = result.about["ranges"]["flops"]
    grid = np.geomspace(low, 30 * high, 40)
    line, band = _along_optimum(result, "params", grid)
    name = "the law" if result.form in PARAMETRIC else "parabolas"
    axes.plot(grid, line, color="tab:blue", label=f"{name}: a = {result.exponents['a']:.3f}")
    if result.draws:
        axes.fill_between(grid, band[:, 0], band[:, 1], color="tab:blue", alpha=0.2, lw=0, label="95%")
    for method, marker, colour in (("parabola", "x", "tab:red"), ("akima", "+", "tab:green")):
        points = np.array(
            [(p["budget"], p[method]) for p in result.profiles if p[method] is not None], dtype=np.float64
        ).reshape(-1, 2)
        points = points[np.isfinite(points).all(1)]
        if len(points) > 1:
            slope, height = np.polyfit(np.log(points[:, 0]), np.log(points[:, 1]), 1)
            axes.plot(grid, np.exp(height + slope * np.log(grid)), "--", lw=0.8, color=colour)
            axes.plot(*points.T, marker, color=colour, label=f"{method}: a = {slope:.3f}")
    axes.axvline(high, color="0.6", lw=0.8, ls=":")
    drawn = np.isfinite(line).any() or np.isfinite(band).any() or bool(result.profiles)
    axes.set(xscale="log", xlabel="compute, FLOPs (dotted: largest run)", ylabel="optimal N")
    axes.set(yscale="log" if drawn else "linear")
    axes.set_title("approaches against each other", fontsize=10)
    axes.legend(fontsize=8)


def residuals(axes: Axes, result: Result) -> None:
    """log loss minus log of the prediction, against D / N (bnsl: its axis), coloured by compute."""
    rows = {name: np.array(values) for name, values in result.rows.items()}
    if result.form == "bnsl":
        predicted, x, label = (
            loss_at("bnsl", result.coefficients, x=rows["samples"]),
            rows["samples"],
            result.about["axis"],
        )
    else:
        at = {name: rows[name] for name in ("params", "samples", "unique") if name in rows}
        if result.form != "repeats":
            at.pop("unique", None)
        predicted = loss_at(result.form, result.coefficients, **at)
        x, label = rows["samples"] / rows["params"], "D / N"
    error = 100 * (np.log(rows["loss"]) - np.log(predicted))
    points = axes.scatter(
        x, error, c=np.log10(rows["flops"]), s=12, cmap="viridis", rasterized=len(x) > _MANY
    )
    axes.figure.colorbar(points, ax=axes, label="log10 FLOPs")
    axes.axhline(0, color="0.5", lw=0.8)
    limit = 1.1 * float(np.quantile(np.abs(error), 0.98)) + 1e-6
    hidden = int((np.abs(error) > limit).sum())
    axes.set(xscale="log", xlabel=label, ylabel="residual of log loss, %", ylim=(-limit, limit))
    axes.set_title("residuals" + (f" ({hidden} beyond the frame)" if hidden else ""), fontsize=10)


def prediction(axes: Axes, result: Result) -> None:
    """The loss along the compute-optimal line with its 95% band, to 30 times the largest compute; the runs below."""
    low, high = result.about["ranges"]["flops"]
    grid = np.geomspace(low, 30 * high, 50)
    line, band = _along_optimum(result, "loss", grid)
    axes.plot(grid, line, color="tab:blue", label="compute-optimal")
    if result.draws:
        axes.fill_between(grid, band[:, 0], band[:, 1], color="tab:blue", alpha=0.2, lw=0, label="95%")
    flops, loss = np.array(result.rows["flops"]), np.array(result.rows["loss"])
    best = frontier(flops, loss)
    axes.scatter(flops, loss, s=6, color="0.75", rasterized=len(loss) > _MANY, label="runs")
    axes.scatter(flops[best], loss[best], s=12, color="tab:orange", label="no cheaper run is better")
    axes.axvline(high, color="0.6", lw=0.8, ls=":")
    top = float(np.quantile(loss, 0.98))
    least = float(np.concatenate([loss, line[np.isfinite(line)]]).min())
    axes.set(
        xscale="log",
        xlabel="compute, FLOPs (dotted: largest run)",
        ylabel="loss",
        ylim=(0.97 * least, 1.01 * top),
    )
    floor = result.coefficients.get("E")
    seen = floor is not None and floor > axes.get_ylim()[0]
    if floor is not None and seen:
        axes.axhline(floor, color="tab:red", lw=0.8, ls="--", label="E")
    axes.set_title(
        "prediction" + ("" if seen or floor is None else f" (E = {floor:.3g} is below the frame)"),
        fontsize=10,
    )
    axes.legend(fontsize=8)


def prediction_bnsl(axes: Axes, result: Result) -> None:
    """The curve along the axis with its band, to 30 times its largest value."""
    x, loss = np.array(result.rows["samples"]), np.array(result.rows["loss"])
    grid = np.geomspace(x.min(), 30 * x.max(), 120)
    axes.plot(grid, loss_at("bnsl", result.coefficients, x=grid), color="tab:blue", label="broken power law")
    if result.draws:
        drawn = loss_at("bnsl", {k: v[:, None] for k, v in result.values().items()}, x=grid[None])
        low, high = np.quantile(drawn, _BAND, axis=0)
        axes.fill_between(grid, low, high, color="tab:blue", alpha=0.2, lw=0, label="95%")
    axes.plot(x, loss, "o", ms=3.5, color="tab:orange", label="runs")
    axes.axvline(result.coefficients["d1"], color="tab:red", lw=0.8, ls="--", label="break")
    axes.set(xscale="log", yscale="log", xlabel=result.about["axis"], ylabel="loss")
    axes.set_title("prediction", fontsize=10)
    axes.legend(fontsize=8)


def identified(axes: Axes, result: Result) -> None:
    """How far each coefficient's draws spread, as multiples of its value: what is wide is not identified."""
    names, labels, wide = list(result.coefficients), [], 0
    drawn = {name: np.nan_to_num(value, nan=np.inf) for name, value in result.values().items()}  # overflown
    fixed = [name for name in names if name not in drawn or drawn[name].min() == drawn[name].max()]
    names = [name for name in names if name not in fixed]
    for place, name in enumerate(reversed(names)):
        value, draws = result.coefficients[name], drawn[name]
        scale = abs(value) if value else float(np.median(np.abs(draws))) or 1.0
        ratio = np.clip(draws / scale, 1e-2, 1e2)
        low, high = np.quantile(ratio, _BAND)
        loose = low <= 0.5 or high >= 2.0
        wide += loose
        axes.plot(
            [low, high], [place, place], lw=5, color="tab:red" if loose else "tab:blue", solid_capstyle="butt"
        )
        axes.plot(1.0, place, "k|", ms=12)
        labels.append(f"{name} = {value:.4g}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(
        xscale="log",
        xlim=(0.9e-2, 1.1e2),
        ylim=(-0.6, len(labels) - 0.4),
        xlabel="95% interval over the value (cut at 0.01 and 100)",
    )
    note = f"{wide} of {len(labels)} loose by a factor of 2 or more (red)"
    axes.set_title(note + (f"; {', '.join(fixed)} fixed" if fixed else ""), fontsize=10)


def profiles(axes: Axes, result: Result) -> None:
    """How the objective rises when one coefficient is held elsewhere: flat valleys are not identified."""
    curves = result.about["profiles"]
    for name, curve in curves.items():
        value, objective = np.array(curve["value"]), np.array(curve["objective"])
        scale = result.coefficients[name] or float(value[-1])
        axes.plot(
            value / scale, 100 * np.maximum(objective / result.objective - 1, 0), ".-", ms=4, lw=1, label=name
        )
    axes.axhline(2, color="0.6", lw=0.8, ls=":")
    log = result.form == "repeats"
    axes.set(xlabel="value held, over the fitted one", ylabel="objective above the least, %")
    axes.set(xscale="log" if log else "linear", ylim=(-1, 20), xlim=None if log else (0, 3))
    axes.set_title("profiles (below the dotted line values are not told apart)", fontsize=10)
    axes.legend(fontsize=8)
