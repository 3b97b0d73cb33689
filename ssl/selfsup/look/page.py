"""`selfsup data show`: one HTML page on what a folder of shards holds and what training makes of it.

The page stands alone: pictures are inside it, nothing is loaded from elsewhere, there are no scripts,
and a policy in its head forbids both. Keys and class names come from strangers and are escaped.
"""

import base64
import io
from html import escape
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from selfsup.config import merge, read_yaml, validate
from selfsup.data.images import TrainImages
from selfsup.data.index import ShardIndex, open_shards
from selfsup.data.order import sample_order
from selfsup.data.reader import ShardReader
from selfsup.durable import write_atomically
from selfsup.look.measure import Measured, Seen, Tally, keyed_rows, look_at
from selfsup.recipe import Recipe

THUMBNAIL = 160
"""Longest side of a stored image on the page, in pixels; smaller ones are shown as they are."""
_CLASSES_SHOWN = 200
_GENERATOR = '<meta name="generator" content="selfsup data show">'

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .15em .8em .15em 0; text-align: left;
vertical-align: top; } pre { background: #8882; padding: .8em; }
.sheet { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; width: 10.5em; }
figcaption { font-size: 12px; overflow-wrap: anywhere; } img { max-width: 160px; image-rendering: pixelated; }
img.small { width: 96px; } .bad { border: 1px solid #c00; color: #c00; padding: .5em; font-size: 12px; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def main_show(
    shards: Annotated[str, tyro.conf.arg(metavar="SHARDS")],
    /,
    *,
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    samples: int = 64,
    measure: int = 1000,
    seed: int = 0,
) -> None:
    """Writes one HTML page on a folder of shards: statistics and a contact sheet of random samples.

    Args:
        shards: the folder that holds them.
        config: a training config; beside each sample stands the view a run on these shards trains on.
        out: the page; default NAME.html here, by the folder's name. An earlier page is replaced.
        samples: images shown.
        measure: images read for the statistics (at least those shown).
        seed: another seed shows other samples.
    """
    path = out if out is not None else Path(f"{Path(shards).expanduser().resolve().name}.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {path}: expected a file ending in .html, got {path.suffix or 'no suffix'}")
    if path.exists() and not (path.is_file() and _GENERATOR.encode() in path.read_bytes()[:1000]):
        raise ValueError(f"--out {path}: exists and is not an earlier page; give another name")
    for name, value in (("samples", samples), ("measure", measure)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    index = open_shards(shards)
    recipe = None if config is None else _recipe(config, shards)
    page, result = build_page(index, recipe, samples, max(samples, measure), seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    except OSError as error:
        raise ValueError(f"--out {path}: cannot write it: {error.strerror or error}") from None
    bad = 0 if result is None else result.undecodable
    of = f"{bad} of {min(len(index), max(samples, measure))} images read cannot be decoded"
    if result is None:
        print(f"{path}: not one of the images read can be decoded; see: selfsup data check {index.folder}")
    else:
        print(f"{path}: {len(index)} samples" + (f"; {of}" if bad else ""))
        print(_paste(result, recipe))


def _recipe(config: Path, shards: str) -> Recipe:
    """The recipe as it would train on `shards`. Raises ValueError where its views have no fixed place."""
    content = merge({"run": {"dir": "none"}}, read_yaml(config))
    recipe = validate(Recipe, merge(content, {"data": {"shards": shards}}))
    if recipe.encoder.reads == "text":
        raise ValueError(
            f"{config}: a recipe of text, which has no views to show; see its rows with: selfsup train {config} --dry-run"
        )
    if recipe.data.index == "none":
        raise ValueError(
            f"{config}: data.index: none streams the shards, so no view has a fixed place to be shown; "
            f"set data.index: auto"
        )
    return recipe


def build_page(
    index: ShardIndex, recipe: Recipe | None, samples: int, measure: int, seed: int
) -> tuple[str, Measured | None]:
    """The page, and what was measured (None: nothing could be decoded).

    With a recipe the samples shown stand at random positions of its epoch 0, and beside each is the
    view that training sees there, pixel by pixel.
    """
    places = keyed_rows(len(index), measure, seed)
    rows = places
    if recipe is not None:
        rows = sample_order(recipe.seed, 0, places, len(index), recipe.data.order)
    reader, tally = ShardReader(index), Tally()
    shown: list[tuple[int, Seen]] = []
    for place, row in zip(places.tolist(), tqdm(rows.tolist(), desc="show", unit="img", disable=None)):
        seen = look_at(index, reader, row)
        tally.add(seen)
        if len(shown) < samples:  # of photographs only what the page shows is kept
            small = None if seen.rgb is None else thumbnail(seen.rgb)
            shown.append((place, seen._replace(rgb=small, grey=None)))
    reader.close()
    measured = tally.result()
    views = {} if recipe is None else training_views(index, recipe, shown)
    figures = [_figure(index, seen, place, views.get(place)) for place, seen in shown]
    about = "" if recipe is None else _about_views(recipe)
    title = escape(str(index.folder))
    body = [
        f"<h1>{title}</h1>",
        _overview(index),
        "<h2>Measured</h2>",
        _measured(measured, recipe, len(places)),
        "<h2>Classes</h2>",
        _classes(index),
        f"<h2>Samples</h2><p>{len(shown)} at random (seed {seed}).{about}</p>",
        f'<div class="sheet">{"".join(figures)}</div>',
    ]
    head = (
        f'<meta charset="utf-8">{_GENERATOR}<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{chr(10).join(body)}</body></html>\n'
    return page, measured


def training_views(
    index: ShardIndex, recipe: Recipe, shown: list[tuple[int, Seen]]
) -> dict[int, UInt8[np.ndarray, "c s s"]]:
    """The view (the first of several) that training sees at each position of epoch 0, of those samples that
    can be decoded."""
    places = np.array([place for place, seen in shown if seen.rgb is not None], dtype=np.int64)
    if not len(places):
        return {}
    vit = recipe.encoder
    data = TrainImages(recipe.data, index, recipe.seed, vit.img_size, vit.in_chans)
    batch = data.batch(places)  # in epoch 0 the cursor is the position
    data.reader.close()
    return dict(zip(places.tolist(), batch.images.numpy()))


def _about_views(recipe: Recipe) -> str:
    kinds = recipe.data.kinds(recipe.encoder.img_size)
    first = "first " if len(kinds) > 1 else ""
    return (
        f" Beside each the {first}view at its position in epoch 0 of a run with seed {recipe.seed} on these "
        f"shards, {kinds[0].size} pixels wide, as the encoder gets it before data.mean and data.std."
    )


def _overview(index: ShardIndex) -> str:
    on_disk = sum(shard.size for shard in index.shards)
    lengths = index.length
    facts = [
        ("samples", f"{len(index):,}"),
        ("shards", f"{len(index.shards):,}"),
        ("bytes", f"{on_disk:,} in shards, of these {int(lengths.sum()):,} encoded images"),
        ("encoded image", f"{lengths.min():,} to {lengths.max():,} bytes, median {np.median(lengths):,.0f}"),
        ("fingerprint", index.fingerprint),
    ]
    facts += [(f"left out: {reason}", f"{count:,}") for reason, count in index.skipped.items()]
    return _table(facts)


def _measured(measured: Measured | None, recipe: Recipe | None, read: int) -> str:
    if measured is None:
        return f'<p class="bad">Not one of {read} images read can be decoded.</p>'

    def span(values: tuple[int, float, int]) -> str:
        return f"{values[0]} to {values[2]} pixels, median {values[1]:g}"

    facts = [
        ("images read", f"{read:,}, at random"),
        ("cannot be decoded", f"{measured.undecodable:,}"),
        ("height", span(measured.heights)),
        ("width", span(measured.widths)),
        ("formats", ", ".join(f"{kind} {count:,}" for kind, count in measured.kinds.items())),
        ("channels as stored", ", ".join(f"{mode} {count:,}" for mode, count in measured.modes.items())),
    ]
    note = "<p>Mean and standard deviation of pixels in [0, 1], each image weighing the same:</p>"
    return f"{_table(facts)}{note}<pre>{escape(_paste(measured, recipe))}</pre>"


def _paste(measured: Measured, recipe: Recipe | None) -> str:
    """The lines of a config that say what was measured, for the channels that the recipe reads."""

    def numbers(values: tuple[float, ...]) -> str:
        return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"

    lines = []
    for channels, found in measured.channels.items():
        if recipe is None or channels == recipe.encoder.in_chans:
            lines.append(f"data:  # with encoder.in_chans: {channels}")
            lines += [f"  mean: {numbers(found.mean)}", f"  std: {numbers(found.std)}"]
    return "\n".join(lines)


def _classes(index: ShardIndex) -> str:
    labelled = index.label[index.label >= 0]
    without = len(index) - len(labelled)
    found = dict(zip(*(a.tolist() for a in np.unique(labelled, return_counts=True))))
    labels = sorted({*found, *range(len(index.classes))})  # a class without a sample counts zero
    rows = [(class_name(index, label), f"{found.get(label, 0):,}") for label in labels[:_CLASSES_SHOWN]]
    rest = f"<p>and {len(labels) - len(rows):,} more classes</p>" if len(labels) > len(rows) else ""
    about = f"{len(labels):,} classes; {without:,} samples without a label."
    return f"<p>{about}</p>{_table(rows)}{rest}"


def class_name(index: ShardIndex, label: int) -> str:
    """The name of a label: from classes.json, else its number; `no label` for -1."""
    if label < 0:
        return "no label"
    return index.classes[label] if label < len(index.classes) else str(label)


def _figure(index: ShardIndex, seen: Seen, place: int, view: np.ndarray | None) -> str:
    label = class_name(index, int(index.label[seen.row]))
    text = f"{escape(index.key(seen.row))}<br>{escape(label)}"
    if seen.rgb is None:
        return f'<figure><div class="bad">{escape(seen.fault)}</div><figcaption>{text}</figcaption></figure>'
    height, width = seen.size
    text += f"<br>{width} x {height} {escape(seen.kind)}"
    pictures = _image(seen.rgb, "the stored image")
    if view is not None:
        text += f"<br>position {place}"
        pictures += _image(view.transpose(1, 2, 0), "the training view")
    return f"<figure>{pictures}<figcaption>{text}</figcaption></figure>"


def thumbnail(pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "H W c"]:
    """The image with its longest side at most THUMBNAIL."""
    if max(pixels.shape[:2]) <= THUMBNAIL:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def _image(pixels: UInt8[np.ndarray, "h w c"], alt: str) -> str:
    """The picture as a lossless PNG inside an <img>."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(pixels.shape[:2]) < 96 else ""
    return f'<img{small} alt="{alt}" src="data:image/png;base64,{data}">'


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows]
    return f"<table>{''.join(cells)}</table>"
