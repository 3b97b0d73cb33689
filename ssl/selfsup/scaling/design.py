"""Doubts about a table that need no fit: what the runs cannot tell, whatever law is fitted."""

import numpy as np
from jaxtyping import Bool, Float, Int

from selfsup.scaling.finding import Finding
from selfsup.scaling.isoflop import isoflop
from selfsup.scaling.table import Runs, same_cell

SHORT_STEPS = 600
WARMUP_SHARE = 0.2
PARAMETERS = {"chinchilla": 5, "tied": 4, "kaplan": 4, "repeats": 7}


def check_design(runs: Runs, form: str, parameters: int | None = None) -> list[Finding]:
    """Too few runs or sizes, one ratio of data to parameters, repeats, short runs, compute off target, noise.

    `parameters` are those that are fitted, where some of the form's are given.
    """
    found = [*_counts(runs, parameters or PARAMETERS[form]), *_ratio(runs), *_repeated(runs, form), *_short(runs), *_target(runs)]
    found += _flops(runs)
    found += _seeds(runs)
    return found


def _counts(runs: Runs, parameters: int) -> list[Finding]:
    clusters, found = int(runs.cluster.max()) + 1, []
    what = "runs (clusters)" if runs.clustered else "runs"
    if clusters <= parameters:
        text = f"{clusters} {what} for {parameters} parameters: any law goes through them; at least {parameters + 1}"
        found.append(Finding("few runs", clusters, parameters + 1, text, refuses=True))
    elif clusters < 4 * parameters:
        text = (
            f"{clusters} {what} for {parameters} parameters (below {4 * parameters}): trust the predictions' intervals,"
            " not single coefficients"
        )
        found.append(Finding("few runs", clusters, 4 * parameters, text))
    for name, values in (("sizes", runs.params), ("amounts of data", runs.samples)):
        count = len(np.unique(np.round(np.log(values), 2)))
        if count < 3:
            text = f"{count} different {name}: at least 3 show that the law bends"
            found.append(Finding("few " + name, count, 3, text, refuses=True))
    span = float(runs.flops.max() / runs.flops.min())
    if span < 10:
        text = f"compute spans a factor of {span:.3g} (below 10): little to extrapolate from"
        found.append(Finding("compute span", span, 10, text, refuses=span < 2))
    return found


def _ratio(runs: Runs) -> list[Finding]:
    """N and D that move together cannot be told apart (2605.08541)."""
    ratio = runs.samples / runs.params
    span = float(ratio.max() / ratio.min())
    if span < 2:
        text = (
            f"all runs have nearly one D/N (largest over smallest {span:.3g}, below 2): N and D cannot be told apart, "
            "so the exponent a is anything; add runs of the same compute with more and with fewer parameters"
        )
        return [Finding("one ratio", span, 2, text, refuses=True)]
    x, y = np.log(runs.params), np.log(runs.samples)
    together = float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 1.0
    if together > 0.98:
        text = f"log N and log D correlate by {together:.4f} (above 0.98): N and D cannot be told apart"
        return [Finding("one ratio", together, 0.98, text, refuses=True)]
    if span < 10:
        text = (
            f"D/N spans a factor of {span:.3g} (below 10): the exponents rest on little; +-3 "
            "times N at one compute gives 81"
        )
        return [Finding("narrow ratio", span, 10, text)]
    return []


def _repeated(runs: Runs, form: str) -> list[Finding]:
    if runs.unique is None or form == "repeats":
        return []
    epochs = runs.samples / runs.unique
    count = int((epochs > 1.001).sum())
    if not count:
        return []
    text = (
        f"{count} of {len(runs)} rows repeat their data (up to {epochs.max():.3g} epochs), which "
        "this law counts as fresh; "
        "take --form repeats, or the runs of one epoch"
    )
    return [Finding("repeated data", float(epochs.max()), 1, text)]


def _short(runs: Runs) -> list[Finding]:
    if runs.steps is None:
        return []
    there = np.isfinite(runs.steps) & (runs.steps > 0)
    found = missing("--steps", there)
    short = there & (runs.steps < SHORT_STEPS)
    if short.any():
        least = float(runs.steps[short].min())
        text = (
            f"{int(short.sum())} of {int(there.sum())} rows have fewer than {SHORT_STEPS} steps (least {least:.0f}): "
            "their loss is of the warm-up and the schedule, not of the size"
        )
        found.append(Finding("short runs", least, SHORT_STEPS, text))
    if runs.warmup is None:
        return found
    known = np.isfinite(runs.warmup) & (runs.warmup >= 0)
    found += missing("--warmup", known)
    known &= there
    share = runs.warmup[known] / runs.steps[known]
    count = int((share > WARMUP_SHARE).sum())
    if count:
        text = (
            f"{count} of {len(share)} rows warm up for more than {WARMUP_SHARE:.0%} of "
            f"their steps (up to {share.max():.0%})"
        )
        found.append(Finding("warm-up", float(share.max()), WARMUP_SHARE, text))
    return found


def missing(flag: str, there: Bool[np.ndarray, " n"]) -> list[Finding]:
    """Rows without a usable number in a column that is only judged: they stay in the fit, and are counted."""
    count = int((~there).sum())
    if not count:
        return []
    text = f"{count} of {len(there)} rows have no usable number in the column of {flag}: of those it is not judged"
    return [Finding("missing values", count, 0, text)]


def _target(runs: Runs) -> list[Finding]:
    if runs.budget is None:
        return []
    off = np.abs(runs.flops / runs.budget - 1)
    count = int((off > 0.01).sum())
    if not count:
        return []
    text = (
        f"{count} of {len(runs)} rows miss their budget by more than 1% (up to {off.max():.1%}): "
        "N and D or their FLOPs "
        "are counted in another way than the budget"
    )
    return [Finding("off budget", float(off.max()), 0.01, text)]


def _flops(runs: Runs) -> list[Finding]:
    """Where the table gives both samples and FLOPs: is their ratio one number?"""
    if not runs.measured_flops:
        return []
    ratio = runs.flops / (runs.params * runs.samples)
    spread = float(ratio.max() / ratio.min() - 1)
    if spread <= 0.01:
        return []
    cost = runs.cost
    taken = f"{cost.base:.3g} {cost.extra:+.3g} N^-{cost.power:.3g}" if cost.extra else f"{cost.base:.3g}"
    text = (
        f"FLOPs / (N D) goes from {ratio.min():.3g} to {ratio.max():.3g}; plans take {taken} (off by {cost.off:.1%} at "
        "most), and a and b are for C proportional to N D. Where N leaves out embeddings or attention is counted, small "
        "models cost more than 6 N D"
    )
    return [Finding("FLOPs per N D", spread, 0.01, text)]


def seed_spread(runs: Runs) -> tuple[float, int]:
    """The pooled standard deviation of losses of repeated cells (N, D, distinct data and rate within 1%), and its
    degrees of freedom."""
    cell = same_cell(runs.params, runs.samples, runs.unique, runs.lr)
    return pooled_spread(runs.loss, cell)


def pooled_spread(values: Float[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> tuple[float, int]:
    """The standard deviation within groups (0, 1, ...), pooled, and its degrees of freedom: nan, 0 where none has two."""
    count = np.bincount(group)
    mean = np.bincount(group, values) / count
    freedom = int((count - 1).sum())
    squares = float(((values - mean[group]) ** 2).sum())
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (float("nan"), 0)


def _seeds(runs: Runs) -> list[Finding]:
    spread, freedom = seed_spread(runs)
    depths = [profile.depth for profile in isoflop(runs).profiles] if freedom else []
    if not depths:
        return []
    depth = float(np.median(depths))
    share = spread / depth
    if share <= 0.2:
        return []
    text = (
        f"repeated runs differ by {spread:.3g} (standard deviation), {share:.0%} of the median "
        f"depth {depth:.3g} of an isoFLOP "
        "curve (above 20%): the minima are noise; repeat more or widen the sizes"
    )
    return [Finding("seed noise", share, 0.2, text)]


def check_untrained(runs: Runs, vocab: int) -> list[Finding]:
    """Losses in nats against ln V, the cross-entropy of an untrained model over V symbols."""
    expected = float(np.log(vocab))
    found = []
    if runs.initial_loss is not None:
        there = np.isfinite(runs.initial_loss)
        found += missing("--initial-loss", there)
        off = np.abs(runs.initial_loss[there] - expected)
        count = int((off > 0.05 * expected).sum())
        if count:
            text = (
                f"{count} of {len(off)} rows start at a loss up to {off.max():.3g} from ln "
                f"{vocab} = {expected:.3g} (more than "
                "5%): another vocabulary, another unit (bits?), or a head that does not start at zero"
            )
            found.append(Finding("initial loss", float(off.max() / expected), 0.05, text))
    count = int((runs.loss >= expected).sum())
    if count:
        text = (
            f"{count} of {len(runs)} losses are not below ln {vocab} = {expected:.3g}, that of an "
            "untrained model: diverged "
            f"(lines {', '.join(str(line) for line in runs.line[runs.loss >= expected][:5])}); leave them out"
        )
        found.append(Finding("diverged", float(runs.loss.max()), expected, text))
    return found
