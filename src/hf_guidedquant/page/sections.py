"""What stands on the page of a run."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..report import LayerReport, Report, megabytes
from .drawings import LEVELS, chart, colour_map, grid_of, shade
from .markup import Html, join, section, table, tag, told


def title_of(report: Report) -> str:
    """The original's name, if it is known."""
    return str(_dict(report.settings.get("provenance")).get("base_model") or report.model)


def sections(report: Report) -> list[Html]:
    """All that there is to say of a run."""
    found = [
        tag("h1", title_of(report)),
        tag("p", "Quantized with hf-guidedquant. ", _method(report.settings), class_="quiet"),
        _tiles(report),
        section("What it is", _facts(report)),
        section("Measured", table(report.measured.items(), "facts") if report.measured else None),
        section("Where the error is", _objectives(report)),
        section("Bits per layer", _bits(report)),
        section("Trained block by block", _reconstruction(report)),
        section("Distilled end to end", _distillation(report)),
        section("What the data needed", _repairs(report)),
        section("Time", _times(report)),
        section("Layers", _layers(report)),
        section("Left in full precision", _skipped(report)),
        section("All settings", _settings(report)),
    ]
    return [part for part in found if part is not None]


def _dict(value: Any) -> dict[str, Any]:
    """The dictionary that should be here."""
    return value if isinstance(value, dict) else {}


def _method(settings: Mapping[str, Any]) -> str:
    method = f"Method {settings.get('method', 'unknown')}"
    return method + (", guided by the end loss." if settings.get("guided") else ".")


def _tiles(report: Report) -> Html:
    ratio = f"{report.dense_bytes / report.quantized_bytes:.2f}x smaller than {megabytes(report.dense_bytes)}"
    tiles = {
        "bits per weight": (f"{report.bits_per_weight:.3f}", "codebooks included"),
        "size": (megabytes(report.quantized_bytes), ratio),
        "layers": (f"{len(report.layers)}", f"{len(report.skipped)} weights in full precision"),
        "time": (_duration(sum(report.seconds.values())), None),
    }
    tiles |= {key: (told(value), "measured") for key, value in report.measured.items() if isinstance(value, float)}
    return tag(
        "dl",
        join(
            tag("div", tag("dt", key), tag("dd", value, *([tag("small", note)] if note else [])))
            for key, (value, note) in tiles.items()
        ),
        class_="tiles",
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if not seconds >= 120 else f"{seconds / 60:.1f} min"


def _facts(report: Report) -> Html:
    settings = report.settings
    provenance = _dict(settings.get("provenance"))
    facts: dict[str, Any] = {"model class": report.model}
    if "base_model" in provenance:
        facts["original"] = provenance["base_model"]
    facts["bits"] = settings.get("bits", "")
    facts["Hessians per layer"] = settings.get("num_groups", "")
    if "calibration" in provenance:
        counts = " ".join(str(provenance.get(key, "?")) + f" {key}," for key in ("rows", "tokens"))
        facts["calibration"] = f"{provenance['calibration']}: {counts} seed {provenance.get('seed', '?')}"
        facts["sha256 of its tokens"] = provenance.get("sha256", "")
    for stage in ("reconstruct", "distill"):
        if settings.get(stage):
            facts[stage] = ", ".join(f"{key} {told(value)}" for key, value in _dict(settings[stage]).items())
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in _dict(provenance.get("versions")).items())
    return table(facts.items(), "facts")


def _objectives(report: Report) -> Html | None:
    """The layers' objectives of the first stage and of the last, in one scale of colours."""
    layers = [layer for layer in report.layers if layer.objectives]
    if not layers:
        return None
    ends = [0, -1] if any(len(layer.objectives) > 1 for layer in layers) else [-1]
    found = [{layer.plan.name: list(layer.objectives.items())[end] for layer in layers} for end in ends]
    grids = [grid_of({name: value for name, (_, value) in layer.items()}) for layer in found]
    positive = [value for grid in grids for value in grid.values() if 0 < value < math.inf]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    stages = [", ".join(dict.fromkeys(stage for stage, _ in layer.values())) for layer in found]
    scale = tag("tr", *(tag("td", class_=f"h{level}") for level in range(LEVELS)))
    return join(
        [
            tag(
                "p",
                "Weighted squared error of a layer, relative to its weights. Rows are kinds of layers, columns "
                "decoder blocks; the colours' scale is logarithmic. A cell that stands out is a layer to look at.",
                class_="quiet",
            ),
            *(
                tag(
                    "figure",
                    tag("figcaption", f"after {stage}"),
                    colour_map(grid, lambda value: shade(value, low, high)),
                )
                for stage, grid in zip(stages, grids, strict=True)
            ),
            tag("figure", tag("figcaption", f"{low:.2g} to {high:.2g}"), tag("table", scale, class_="map scale")),
        ]
    )


def _bits(report: Report) -> Html | None:
    """Which layers got how many bits, if not all got the same."""
    widths = sorted({layer.plan.bits for layer in report.layers})
    if len(widths) < 2:
        return None
    total = sum(layer.plan.weights for layer in report.layers)
    shares = {width: sum(x.plan.weights for x in report.layers if x.plan.bits == width) / total for width in widths}
    summary = ", ".join(f"{share:.1%} of the weights at {width} bits" for width, share in shares.items())
    grid = grid_of({layer.plan.name: layer.plan.bits for layer in report.layers})
    return join(
        [tag("p", summary + "."), colour_map(grid, lambda bits: (f"b{round(bits)}", f"{bits:.2g}"), "map bits")]
    )


def _reconstruction(report: Report) -> Html | None:
    if report.reconstruction is None:
        return None
    blocks = report.reconstruction.blocks
    series = {
        "solved": dict(enumerate(block.solved for block in blocks)),
        "trained": dict(enumerate(block.trained for block in blocks)),
    }
    drawn = chart(series, "block", "relative squared error, rows held back")
    return join([tag("p", report.reconstruction.describe()), drawn])


def _distillation(report: Report) -> Html | None:
    if report.distillation is None:
        return None
    found = report.distillation
    series = {
        "rows trained on": dict(enumerate(found.trained, start=1)),
        "rows held back": dict(enumerate(found.held_back)),
    }
    return join([tag("p", found.describe()), chart(series, "epoch", "KL to the original, nats per token")])


def _repairs(report: Report) -> Html:
    found = [(layer.plan.name, note) for layer in report.layers for note in _notes(layer)]
    if not found:
        return tag("p", "Nothing: no Hessian had to be repaired, and no row was left out.")
    return tag("ul", *(tag("li", f"{name}: {note}") for name, note in found))


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


def _times(report: Report) -> Html | None:
    total = sum(report.seconds.values())
    if not 0 < total < math.inf:
        return None
    rows = []
    for stage, seconds in report.seconds.items():
        bar = tag("svg", tag("rect", width=f"{100 * seconds / total:.1f}%", height="100%"), class_="bar")
        rows.append(tag("tr", tag("th", stage), tag("td", _duration(seconds), class_="number"), tag("td", bar)))
    return tag("table", *rows, class_="times")


def _layers(report: Report) -> Html:
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
            tag(
                "tr",
                tag("td", plan.name),
                *(tag("td", value, class_="number") for value in (plan.out_features, plan.in_features, plan.bits)),
                tag("td", plan.method),
                *(tag("td", value, class_="number") for value in (plan.num_groups, *errors)),
                tag("td", "; ".join(_notes(layer)), class_="notes"),
            )
        )
    words = ("layer", "method", "notes")
    columns = (tag("th", name, scope="col", class_=None if name in words else "number") for name in names)
    head = tag("thead", tag("tr", *columns))
    layers = tag("table", head, tag("tbody", *rows), class_="layers")
    return tag("div", layers, class_="scroll tall", tabindex="0")


def _skipped(report: Report) -> Html | None:
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    items = (tag("li", tag("b", reason), ": ", ", ".join(names)) for reason, names in reasons.items())
    return tag("ul", *items) if reasons else None


def _settings(report: Report) -> Html:
    shown = {key: value for key, value in report.settings.items() if key != "modules"}
    lines = json.dumps(shown, indent=1, ensure_ascii=True).split("\n")
    text = Html("\n".join(join([line]) for line in lines))
    return tag("details", tag("summary", "as they stand in config.json, layers left out"), tag("pre", text))
