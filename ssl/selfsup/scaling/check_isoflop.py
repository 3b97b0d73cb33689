"""Doubts about isoFLOP profiles: minima on the edge of the sizes, approaches that disagree."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from selfsup.scaling.finding import Finding
from selfsup.scaling.isoflop import Isoflop, isoflop
from selfsup.scaling.table import Runs


def check_isoflop(found: Isoflop, a: float | None, runs: Runs, own: bool) -> list[Finding]:
    """Minima on the edge of the sizes, and approaches that disagree.

    `a`: the exponent of the parametric law, to compare; `own`: the isoFLOP form itself is what was fitted.
    """
    said = []
    profiles = found.profiles
    if len(profiles) < 2:
        if own:
            text = f"{len(profiles)} budgets with at least 4 sizes: an exponent needs two, a doubt about it three"
            said.append(Finding("few budgets", len(profiles), 3, text, refuses=True))
        return said
    edge = [p for p in profiles if p.at_edge or p.outside]
    if edge:
        share = len(edge) / len(profiles)
        shown = ", ".join(f"{p.budget:.2g}" for p in edge[:5])
        text = (
            f"in {len(edge)} of {len(profiles)} budgets ({shown}) the minimum is at or beyond "
            "the smallest or largest size: recentre"
        )
        said.append(Finding("minimum on the edge", share, 0, text, refuses=own and share > 0.25))
    if len(profiles) < 3:
        text = f"{len(profiles)} budgets: no approach can doubt an exponent of two points"
        return [*said, Finding("few budgets", len(profiles), 3, text)]
    parabola, akima = float(found.parabola[1]), float(found.akima[1])
    if abs(parabola - akima) > 0.05:
        text = (
            f"isoFLOP optima grow as C^{parabola:.2f} by parabolas, C^{akima:.2f} by Akima: "
            "curves are wide, lopsided or noisy"
        )
        said.append(
            Finding(
                "parabola and Akima",
                abs(parabola - akima),
                0.05,
                text,
                refuses=own and abs(parabola - akima) > 0.2,
            )
        )
    trimmed = isoflop(runs, within=4.0)
    if len(trimmed.profiles) >= 3 and abs(trimmed.parabola[1] - parabola) > 0.02:
        text = (
            "parabolas through sizes within 4 times the lowest give a = "
            f"{trimmed.parabola[1]:.2f} ({len(trimmed.profiles)} budgets), "
            f"through all {parabola:.2f}: wide curves are no parabolas"
        )
        said.append(Finding("parabola width", float(abs(trimmed.parabola[1] - parabola)), 0.02, text))
    if a is not None and np.isfinite(parabola):
        others = [value for value in (parabola, akima) if np.isfinite(value)]
        apart = max(abs(value - a) for value in others)
        if apart > 0.05:
            far = min(abs(value - a) for value in others) > 0.2
            text = f"approaches disagree: a = {a:.2f} by the law, {parabola:.2f} by parabolas, {akima:.2f} by Akima"
            said.append(Finding("approaches", apart, 0.2 if far else 0.05, text, refuses=far))
    return said


def check_own(a: float, held: Mapping[str, Any] | None) -> list[Finding]:
    """Of the isoFLOP form itself: an exponent that no optimum has, a size that smaller budgets do not foretell."""
    said = []
    if not 0 < a < 1:
        text = f"a = {a:.2f} is outside 0 to 1: with more compute the optimal size or the optimal data would shrink"
        said.append(Finding("exponent outside 0 to 1", a, 0 if a <= 0 else 1, text, refuses=True))
    if held is None:
        return said
    factor, naive = held["size_factor"], held["size_baseline_factor"]
    if factor > 2 or factor > max(1.25, naive):
        text = (
            f"from the smaller budgets the optimal N of the largest is missed by a factor of {factor:.3g}; by N growing "
            f"as the root of C {naive:.3g} (1.25 at most wanted, or less than that; refused above 2)"
        )
        said.append(Finding("held-out size", factor, 2 if factor > 2 else 1.25, text, refuses=factor > 2))
    return said
