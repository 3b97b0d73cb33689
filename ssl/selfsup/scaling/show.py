"""A result and a prediction as text for people."""

from selfsup.scaling.predict import Prediction
from selfsup.scaling.result import Result

_LAWS = {
    "chinchilla": "loss = E + A / N^alpha + B / D^beta",
    "tied": "loss = E + A / N^alpha + B / D^alpha",
    "kaplan": "loss = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D",
    "repeats": "chinchilla at effective data U + U R_D (1 - exp(-(D / U - 1) / R_D)), parameters likewise with R_N",
    "bnsl": "loss = a + b x^-c0 (1 + (x / d1)^(1 / f1))^(-c1 f1)",
    "isoflop": "optimal N = N0 C^a, D = D0 C^b, loss there L0 C^c",
}


def show_result(result: Result) -> None:
    """The result for people."""
    about = result.about
    print(f"{about['table']}: {about['rows_read']} rows, {about['rows_used']} used, {about['runs']} runs")
    for reason, count in about["dropped"].items():
        print(f"  left out: {count} {reason}")
    if about.get("weights"):
        least, most = about["weights"]
        print(f"  rows weigh 1 / sigma over its median (--sigma): {least:.3g} to {most:.3g}")
    if "isoflop" in about:
        print(f"  isoFLOP curves of {about['isoflop']['budgets']} budgets")
        for reason, count in about["isoflop"]["left_out"].items():
            print(f"    not among them: {count} {reason}")
    print(f"\n{result.form}: {_LAWS[result.form]}")
    if result.form != "isoflop":
        starts = f"; {about['starts_agreed']} of {about['starts']} starts agree" if "starts" in about else ""
        print(f"  sum of Huber losses {result.objective:.6g} (delta {about['delta']:g}){starts}")
    shown = dict(result.coefficients)
    if result.form != "isoflop":
        shown |= result.exponents
    for name, value in shown.items():
        print(f"  {name:8} {_number(value):>12}   {_range(result.intervals.get(name))}")
    if about["resamples"]:
        what = "runs" if about["clustered"] else "rows"
        print(
            f"  95% intervals from {about['resamples']} resamples of {about['runs']} {what}, "
            f"{about['unconverged']} without an optimum"
        )
    if result.exponents:
        print(
            "  optimal N grows as C^a, D as C^b; take coefficients from --json: rounded ones predict other losses"
        )
    for name, value in about.get("other_a", {}).items():
        print(f"  a by {name}: {'not determined' if value is None else f'{value:.3f}'}")
    held = result.extrapolation
    if held is not None:
        unit = "budgets" if result.form == "isoflop" else "rows"
        print(
            f"\nlargest runs held out ({held['held_out']} of {held['held_out'] + held['fitted']} {unit}, "
            f"up to {held['reach']:.3g} times the "
            f"largest fitted): {held['error_of']} off by {held['mean_error']:.2%} on average, "
            f"{held['max_error']:.2%} at most\n"
            f"  baseline, {held['baseline']}: {held['baseline_mean_error']:.2%}, {held['baseline_max_error']:.2%}"
        )
        if "size_factor" in held:
            naive = held["size_baseline_factor"]
            print(f"  its optimal N off by a factor of {held['size_factor']:.3g}; N as the root of C: {naive:.3g}")
    for title, findings in (("warnings", result.warnings), ("REFUSED as a ground for plans", result.refused)):
        if findings:
            print(f"\n{title}:")
            for found in findings:
                print(f"  - {found['check']}: {found['text']}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _range(ends: list[float | None] | None) -> str:
    if ends is None or len(ends) < 3:
        return ""
    low, high, level = ends
    return f"{_number(low)} to {'no bound' if high is None else _number(high)} ({_percent(level)})"


def _percent(level: float) -> str:
    """0.999 is 99.9%, not 100%."""
    return f"{100 * level:.10g}%"


def show_prediction(found: Prediction) -> None:
    """The prediction for people."""
    if found.flops is not None:
        print(f"compute {found.flops:.4g} FLOPs")
    names = {"params": "parameters N", "samples": "samples D", "loss": "loss", "epochs": "epochs"}
    for name, (value, low, high) in found.values.items():
        interval = "" if low is None else f"   {_number(low)} to {_number(high)} ({_percent(found.level)})"
        print(f"  {names[name]:13} {_number(value):>11}{interval}")
    if found.price:
        print("\nanother size at the same compute costs")
        for factor, (above, wasted) in found.price.items():
            print(f"  {factor:>4} N   loss +{above:.4f}, {wasted:.0%} of the compute wasted")
    if found.rules:
        print(
            "\nlearning rate and batch by rules for language models under AdamW (they conflict: probe three rates)"
        )
        for name, (rate, batch) in found.rules.items():
            print(f"  {name:8} lr {rate:.3g}, batch {batch:,.0f} tokens")
    for note in found.notes:
        print(f"note: {note}")
