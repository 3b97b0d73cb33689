"""Pictures as files and one HTML page that stands alone: no scripts, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from selfsup.durable import write_atomically
from selfsup.scaling.plot import figures
from selfsup.scaling.result import Result

_GENERATOR = '<meta name="generator" content="selfsup scaling report">'
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .15em .8em .15em 0; text-align: left;
vertical-align: top; } pre { background: #8882; padding: .8em; overflow-x: auto; } .bad { color: #c00; }
.sheet { display: flex; flex-wrap: wrap; gap: 1em; } img { width: 36em; max-width: 100%; background: #fff; }
"""


def write_report(result: Result, folder: Path, sections: Sequence[str] = ()) -> list[Path]:
    """Writes NAME.png and NAME.svg of each picture and report.html. Raises ValueError where it cannot.

    sections: further parts of the page, HTML, as `sweep_report.sections` makes them.
    """
    page = folder / "report.html"
    if page.exists() and _GENERATOR.encode() not in page.read_bytes()[:1000]:
        raise ValueError(
            f"--out {folder}: {page.name} is there and is not an earlier report; give another folder"
        )
    files, pictures = {}, {}
    for name, figure in figures(result).items():
        for kind in ("png", "svg"):
            files[f"{name}.{kind}"] = pictures[name] = render(figure, kind)
    files[page.name] = _page(result, pictures, sections).encode()  # all is made before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write it: {error.strerror or error}") from None
    return [folder / name for name in files]


def render(figure: Figure, kind: str) -> bytes:
    """The picture as PNG or SVG; the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "selfsup", "svg.fonttype": "none"}):
        figure.savefig(
            buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None}
        )
    return buffer.getvalue()


def _page(result: Result, pictures: dict[str, bytes], sections: Sequence[str]) -> str:
    about = result.about
    title = escape(f"{result.form} law of {about.get('table', 'a table')}")
    verdict = "refused as a ground for plans" if result.refused else "not refused"
    images = "".join(
        f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(content).decode()}">'
        for name, content in pictures.items()
    )
    body = [
        f"<h1>{title}</h1><p>{escape(verdict)}; {about['rows_used']} of {about['rows_read']} "
        f"rows, {about['runs']} runs.</p>",
        f"<pre>{escape(about.get('command', ''))}</pre>",
        _findings("Refused", result.refused),
        _findings("Warnings", result.warnings),
        *sections,
        f"<h2>Coefficients</h2>{_coefficients(result)}",
        f"<h2>Largest runs held out</h2>{_held_out(result)}",
        f'<h2>Pictures</h2><div class="sheet">{images}</div>',
        f"<h2>The table</h2>{html_table(_facts(about))}",
    ]
    head = (
        f'<meta charset="utf-8">{_GENERATOR}<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{chr(10).join(body)}</body></html>\n'


def _findings(title: str, findings: list[dict[str, Any]]) -> str:
    if not findings:
        return ""
    items = "".join(
        f"<li><b>{escape(found['check'])}</b>: {escape(found['text'])}</li>" for found in findings
    )
    mark = ' class="bad"' if title == "Refused" else ""
    return f"<h2{mark}>{title}</h2><ul>{items}</ul>"


def _coefficients(result: Result) -> str:
    rows = [("", "value", "low", "high", "level")]
    for name, value in (result.coefficients | result.exponents).items():
        low, high, level = (*result.intervals.get(name, [None, None, None]),)
        rows.append(
            (name, f"{value:.6g}", *("-" if end is None else f"{end:.5g}" for end in (low, high, level)))
        )
    note = f"<p>Sum of Huber losses {result.objective:.6g}.</p>" if result.form != "isoflop" else ""
    return html_table(rows) + note


def _held_out(result: Result) -> str:
    held = result.extrapolation
    if held is None:
        return "<p>Too few runs to hold any out.</p>"
    return html_table([
        ("error of " + held["error_of"], "mean", "largest"),
        ("the law", _shown(held["mean_error"], ".2%"), _shown(held["max_error"], ".2%")),
        ("baseline: " + held["baseline"], *(_shown(held[f"baseline_{k}_error"], ".2%") for k in ("mean", "max"))),
        *([("optimal N off by a factor of", f"{held['size_factor']:.3g}", "")] if "size_factor" in held else []),
        ("compute of the largest over the largest fitted", f"{held['reach']:.3g}", ""),
    ])  # fmt: skip


def _shown(value: float | None, how: str) -> str:
    """A number; what JSON could not hold was not finite."""
    return "not finite" if value is None else f"{value:{how}}"


def _facts(about: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (f"left out: {reason}", str(count)) for reason, count in about["dropped"].items()
    ]
    if "isoflop" in about:
        rows.append(("isoFLOP curves, budgets", str(about["isoflop"]["budgets"])))
        rows += [(f"not among them: {reason}", str(count)) for reason, count in about["isoflop"]["left_out"].items()]
    others = about.get("other_a", {})
    rows += [(f"a by {name}", "-" if value is None else f"{value:.3f}") for name, value in others.items()]
    rows += [(name, f"{low:.4g} to {high:.4g}") for name, (low, high) in about["ranges"].items()]
    rows.append(("FLOPs per N D", "{:.6g} {:+.6g} N^-{:.3g}".format(*about["cost"])))
    named = (
        "delta",
        "resamples",
        "unconverged",
        "seed",
        "starts",
        "starts_agreed",
        "residual_sd",
    )
    return rows + [(name.replace("_", " "), f"{about[name]:.6g}") for name in named if name in about]


def html_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of text as a table, escaped."""
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
