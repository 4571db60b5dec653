"""A run on one page: ``report.html``, which needs nothing but a browser.

What a report holds may come from a stranger's checkpoint. Every text is escaped where a tag is made of it, and the page
itself forbids its browser to load anything, or to run any other script than its own.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import CheckpointError, printable
from .pictures import place_of
from .report import LayerReport, Report, load_report, megabytes

PAGE_FILE = "report.html"

# Colours of the heat map, from the smallest value to the largest.
_LEVELS = 12
# Of a chart, in its own units: width, height, and what is left of and below the curves.
_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 220, 56, 34


def write_page(source: Report | str | os.PathLike, file: str | os.PathLike | None = None) -> Path:
    """Write a run's report as a page that needs no network.

    Args:
        source: A model's ``quantization_report``, or the folder of a saved model.
        file: Where to. Default: ``report.html`` in that folder, or in the current one.

    Returns:
        The file.

    Raises:
        CheckpointError: The folder holds no readable report.
        OSError: The file cannot be written.
    """
    folder = Path() if isinstance(source, Report) else Path(source)
    target = folder / PAGE_FILE if file is None else Path(file)
    text = report_page(source)
    # All at once, and never through a link that somebody has put there.
    with TemporaryDirectory(prefix=".report-", dir=target.parent) as temporary:
        written = Path(temporary) / target.name
        written.write_text(text, encoding="utf-8")
        written.replace(target)
    return target


def report_page(source: Report | str | os.PathLike) -> str:
    """A run's report as HTML: what was made of which model and how, and every layer in a heat map and a table.

    Args:
        source: As for :func:`write_page`.

    Raises:
        CheckpointError: The folder holds no readable report.
    """
    if isinstance(source, Report):
        return _page(source)
    report = load_report(source)
    try:
        return _page(report)
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"The report in {os.fspath(source)} cannot be shown: {error}") from error


def _page(report: Report) -> str:
    provenance = _dict(report.settings.get("provenance"))
    title = str(provenance.get("base_model") or report.model)
    sections = [
        _tag("h1", title),
        _tag("p", "Quantized with hf-guidedquant. ", _method(report.settings), class_="quiet"),
        _tiles(report),
        _section("What it is", _facts(report, provenance)),
        _section("Measured", _table(report.measured.items(), "facts") if report.measured else None),
        _section("Where the error is", _objectives(report)),
        _section("Bits per layer", _bits(report)),
        _section("Trained block by block", _reconstruction(report)),
        _section("Distilled end to end", _distillation(report)),
        _section("What the data needed", _repairs(report)),
        _section("Time", _times(report)),
        _section("Layers", _layers(report)),
        _section("Left in full precision", _skipped(report)),
        _section("All settings", _settings(report)),
    ]
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        _tag("title", title),
        f"<style>{style}</style>",
    )
    body = "\n".join(section for section in sections if section is not None)
    lines = ("<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", body)
    return "\n".join((*lines, f"<script>{script}</script>", "</body>", "</html>", ""))


class _Html(str):
    """What is markup already. Every other text is escaped when it gets into a tag."""


def _tag(name: str, *children: Any, **attributes: Any) -> _Html:
    """An element. ``class_`` is the attribute ``class``; what is None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    told = "".join(f' {key}="{escape(printable(value))}"' for key, value in given.items())
    return _Html(f"<{name}{told}>{_join(children)}</{name}>")


def _join(children: Iterable[Any]) -> _Html:
    return _Html(
        "".join(str(child) if isinstance(child, _Html) else escape(printable(_told(child))) for child in children)
    )


def _told(value: Any) -> str:
    """A value for readers."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _hash(text: str) -> str:
    """How a content security policy names a style or a script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _dict(value: Any) -> dict[str, Any]:
    """The dictionary that should be here."""
    return value if isinstance(value, dict) else {}


def _section(title: str, content: _Html | None) -> _Html | None:
    return None if content is None else _tag("section", _tag("h2", title), content)


def _table(rows: Iterable[Sequence[Any]], kind: str) -> _Html:
    """Two columns: what, and which."""
    return _tag("table", _join(_tag("tr", _tag("th", key), _tag("td", value)) for key, value in rows), class_=kind)


def _method(settings: Mapping[str, Any]) -> str:
    method = f"Method {settings.get('method', 'unknown')}"
    return method + (", guided by the end loss." if settings.get("guided") else ".")


def _tiles(report: Report) -> _Html:
    ratio = f"{report.dense_bytes / report.quantized_bytes:.2f}x smaller than {megabytes(report.dense_bytes)}"
    tiles = {
        "bits per weight": (f"{report.bits_per_weight:.3f}", "codebooks included"),
        "size": (megabytes(report.quantized_bytes), ratio),
        "layers": (f"{len(report.layers)}", f"{len(report.skipped)} weights in full precision"),
        "time": (_duration(sum(report.seconds.values())), None),
    }
    tiles |= {key: (_told(value), "measured") for key, value in report.measured.items() if isinstance(value, float)}
    return _tag(
        "dl",
        _join(
            _tag("div", _tag("dt", key), _tag("dd", value, *([_tag("small", note)] if note else [])))
            for key, (value, note) in tiles.items()
        ),
        class_="tiles",
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if not seconds >= 120 else f"{seconds / 60:.1f} min"


def _facts(report: Report, provenance: Mapping[str, Any]) -> _Html:
    settings = report.settings
    facts: dict[str, Any] = {"model class": report.model}
    if "base_model" in provenance:
        facts["original"] = provenance["base_model"]
    facts["bits"] = settings.get("bits", "")
    facts["Hessians per layer"] = settings.get("num_groups", "")
    if "calibration" in provenance:
        told = " ".join(str(provenance.get(key, "?")) + f" {key}," for key in ("rows", "tokens"))
        facts["calibration"] = f"{provenance['calibration']}: {told} seed {provenance.get('seed', '?')}"
        facts["sha256 of its tokens"] = provenance.get("sha256", "")
    for stage in ("reconstruct", "distill"):
        if settings.get(stage):
            facts[stage] = ", ".join(f"{key} {_told(value)}" for key, value in _dict(settings[stage]).items())
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in _dict(provenance.get("versions")).items())
    return _table(facts.items(), "facts")


def _objectives(report: Report) -> _Html | None:
    """The layers' objectives of the first stage and of the last, in one scale of colours."""
    layers = [layer for layer in report.layers if layer.objectives]
    if not layers:
        return None
    ends = [0, -1] if any(len(layer.objectives) > 1 for layer in layers) else [-1]
    found = [{layer.plan.name: list(layer.objectives.items())[end] for layer in layers} for end in ends]
    grids = [_grid({name: value for name, (_, value) in layer.items()}) for layer in found]
    positive = [value for grid in grids for value in grid.values() if 0 < value < math.inf]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    stages = [", ".join(dict.fromkeys(stage for stage, _ in layer.values())) for layer in found]
    scale = _tag("tr", *(_tag("td", class_=f"h{level}") for level in range(_LEVELS)))
    return _join(
        [
            _tag(
                "p",
                "Weighted squared error of a layer, relative to its weights. Rows are kinds of layers, columns "
                "decoder blocks; the colours' scale is logarithmic. A cell that stands out is a layer to look at.",
                class_="quiet",
            ),
            *(
                _tag("figure", _tag("figcaption", f"after {stage}"), _map(grid, lambda value: _level(value, low, high)))
                for stage, grid in zip(stages, grids, strict=True)
            ),
            _tag("figure", _tag("figcaption", f"{low:.2g} to {high:.2g}"), _tag("table", scale, class_="map scale")),
        ]
    )


# (module, block) -> value.
_Grid = dict[tuple[str, str], float]


def _grid(values: Mapping[str, float]) -> _Grid:
    """Values of layers by module and block; experts, numbered inside a block, are one module with their mean."""
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        block, module = place_of(name)
        cells.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), block), []).append(value)
    return {place: sum(values) / len(values) for place, values in cells.items()}


def _map(grid: _Grid, look: Callable[[float], tuple[str, str]], kind: str = "map") -> _Html:
    """A table of coloured cells. ``look`` gives a value's class and the text in its cell."""
    modules, blocks = ([*dict.fromkeys(place[i] for place in grid)] for i in (0, 1))
    rows = [_tag("tr", _tag("th", ""), *(_tag("th", block, scope="col") for block in blocks))]
    body = []
    for module in modules:
        cells = [_tag("th", module, scope="row")]
        for block in blocks:
            value = grid.get((module, block))
            if value is None:
                cells.append(_tag("td", class_="none"))
                continue
            style, text = look(value)
            cells.append(_tag("td", text, class_=style, title=f"{module}, block {block}: {value:.4g}"))
        body.append(_tag("tr", *cells))
    table = _tag("table", _tag("thead", *rows), _tag("tbody", *body), class_=kind)
    return _tag("div", table, class_="scroll")


def _level(value: float, low: float, high: float) -> tuple[str, str]:
    if not 0 < value < math.inf:
        return ("h0", "") if value == 0 else ("none", "!")
    share = math.log(value / low) / math.log(high / low) if high > low else 0.0
    return f"h{round(share * (_LEVELS - 1))}", ""


def _bits(report: Report) -> _Html | None:
    """Which layers got how many bits, if not all got the same."""
    widths = sorted({layer.plan.bits for layer in report.layers})
    if len(widths) < 2:
        return None
    total = sum(layer.plan.weights for layer in report.layers)
    shares = {width: sum(x.plan.weights for x in report.layers if x.plan.bits == width) / total for width in widths}
    told = ", ".join(f"{share:.1%} of the weights at {width} bits" for width, share in shares.items())
    grid = _grid({layer.plan.name: layer.plan.bits for layer in report.layers})
    return _join([_tag("p", told + "."), _map(grid, lambda bits: (f"b{round(bits)}", f"{bits:.2g}"), "map bits")])


def _reconstruction(report: Report) -> _Html | None:
    if report.reconstruction is None:
        return None
    blocks = report.reconstruction.blocks
    series = {
        "solved": dict(enumerate(block.solved for block in blocks)),
        "trained": dict(enumerate(block.trained for block in blocks)),
    }
    told = report.reconstruction.describe()
    return _join([_tag("p", told), _chart(series, "block", "relative squared error, rows held back")])


def _distillation(report: Report) -> _Html | None:
    if report.distillation is None:
        return None
    found = report.distillation
    series = {
        "rows trained on": dict(enumerate(found.trained, start=1)),
        "rows held back": dict(enumerate(found.held_back)),
    }
    return _join([_tag("p", found.describe()), _chart(series, "epoch", "KL to the original, nats per token")])


def _chart(series: Mapping[str, Mapping[int, float]], across: str, up: str) -> _Html:
    """Curves over whole numbers, with zero at the bottom."""
    finite = {name: {x: y for x, y in curve.items() if math.isfinite(y)} for name, curve in series.items()}
    last = max([1, *(x for curve in finite.values() for x in curve)])
    step = _step(max([0.0, *(y for curve in finite.values() for y in curve.values())]))
    top = step * max(1, math.ceil(max([0.0, *(y for c in finite.values() for y in c.values())]) / step))

    def at(x: float, y: float) -> tuple[str, str]:
        right, below = _WIDTH - 16, _HEIGHT - _BELOW
        return f"{_LEFT + x / last * (right - _LEFT):.1f}", f"{below - y / top * (below - 12):.1f}"

    parts = []
    for number in range(round(top / step) + 1):
        left, level = at(0, number * step)
        parts.append(_tag("line", x1=left, x2=at(last, 0)[0], y1=level, y2=level, class_="grid"))
        parts.append(_tag("text", f"{number * step:.3g}", x=_LEFT - 6, y=float(level) + 4, text_anchor="end"))
    for x in range(0, last + 1, max(1, math.ceil(last / 16))):
        parts.append(_tag("text", x, x=at(x, 0)[0], y=_HEIGHT - _BELOW + 15, text_anchor="middle"))
    parts.append(_tag("text", across, x=at(last, 0)[0], y=_HEIGHT - 4, text_anchor="end"))
    legend = []
    for number, (name, curve) in enumerate(finite.items()):
        points = " ".join(",".join(at(x, y)) for x, y in curve.items())
        parts.append(_tag("polyline", points=points, class_=f"s{number}"))
        for x, y in curve.items():
            told = _tag("title", f"{name}, {across} {x}: {y:.5g}")
            parts.append(_tag("circle", told, cx=at(x, y)[0], cy=at(x, y)[1], r=3, class_=f"s{number}"))
        legend.append(_tag("span", f"● {name} ", class_=f"s{number}"))
    svg = _tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=up)
    caption = _tag("figcaption", f"{up}: ", *legend)
    return _tag("figure", caption, _tag("div", svg, class_="scroll"))


def _step(largest: float) -> float:
    """A round number, of which three to seven make the largest."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest / 3))
    return next(unit * factor for factor in (1, 2, 5, 10) if largest <= 7 * unit * factor)


def _repairs(report: Report) -> _Html:
    found = [(layer.plan.name, note) for layer in report.layers for note in _notes(layer)]
    if not found:
        return _tag("p", "Nothing: no Hessian had to be repaired, and no row was left out.")
    return _tag("ul", *(_tag("li", f"{name}: {note}") for name, note in found))


def _notes(layer: LayerReport) -> list[str]:
    """What the layer's statistics needed."""
    notes = {
        f"{layer.dead_inputs} inputs that never carried a value": layer.dead_inputs > 0,
        f"damped by {layer.damping:.0e} of the mean diagonal": layer.damping > 0,
        f"fallback: {layer.fallback}": layer.fallback is not None,
        f"{layer.bad_rows} calibration rows left out": layer.bad_rows > 0,
        f"codebook in {layer.lut_dtype}": layer.lut_dtype != "float16",
    }
    return [note for note, true in notes.items() if true]


def _times(report: Report) -> _Html | None:
    total = sum(report.seconds.values())
    if not 0 < total < math.inf:
        return None
    rows = []
    for stage, seconds in report.seconds.items():
        bar = _tag("svg", _tag("rect", width=f"{100 * seconds / total:.1f}%", height="100%"), class_="bar")
        rows.append(_tag("tr", _tag("th", stage), _tag("td", _duration(seconds), class_="number"), _tag("td", bar)))
    return _tag("table", *rows, class_="times")


def _layers(report: Report) -> _Html:
    stages = [*dict.fromkeys(stage for layer in report.layers for stage in layer.objectives)]
    names = [
        "layer",
        "outputs",
        "inputs",
        "bits",
        "method",
        "groups",
        *(f"error: {stage}" for stage in stages),
        "notes",
    ]
    rows = []
    for layer in report.layers:
        plan = layer.plan
        errors = [f"{layer.objectives[stage]:.3e}" if stage in layer.objectives else "" for stage in stages]
        rows.append(
            _tag(
                "tr",
                _tag("td", plan.name),
                *(_tag("td", value, class_="number") for value in (plan.out_features, plan.in_features, plan.bits)),
                _tag("td", plan.method),
                *(_tag("td", value, class_="number") for value in (plan.num_groups, *errors)),
                _tag("td", "; ".join(_notes(layer)), class_="notes"),
            )
        )
    words = ("layer", "method", "notes")
    columns = (_tag("th", name, scope="col", class_=None if name in words else "number") for name in names)
    head = _tag("thead", _tag("tr", *columns))
    table = _tag("table", head, _tag("tbody", *rows), class_="layers")
    return _tag("div", table, class_="scroll tall", tabindex="0")


def _skipped(report: Report) -> _Html | None:
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    items = (_tag("li", _tag("b", reason), ": ", ", ".join(names)) for reason, names in reasons.items())
    return _tag("ul", *items) if reasons else None


def _settings(report: Report) -> _Html:
    told = {key: value for key, value in report.settings.items() if key != "modules"}
    lines = json.dumps(told, indent=1, ensure_ascii=True).split("\n")
    text = _Html("\n".join(_join([line]) for line in lines))
    return _tag("details", _tag("summary", "as they stand in config.json, layers left out"), _tag("pre", text))
