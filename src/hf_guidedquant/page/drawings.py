"""What a page draws: maps of coloured cells over blocks and modules, and curves."""

import math
import re
from collections.abc import Callable, Mapping

from ..pictures import place_of
from .markup import Html, tag

# Colours of the heat map, from the smallest value to the largest.
LEVELS = 12
# Of a chart, in its own units: width, height, and what is left of and below the curves.
_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 220, 56, 34

# (module, block) -> value.
Grid = dict[tuple[str, str], float]


def grid_of(values: Mapping[str, float]) -> Grid:
    """Values of layers by module and block; experts, numbered inside a block, are one module with their mean."""
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        block, module = place_of(name)
        cells.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), block), []).append(value)
    return {place: sum(values) / len(values) for place, values in cells.items()}


def colour_map(grid: Grid, look: Callable[[float], tuple[str, str]], kind: str = "map") -> Html:
    """A table of coloured cells. ``look`` gives a value's class and the text in its cell."""
    modules, blocks = ([*dict.fromkeys(place[i] for place in grid)] for i in (0, 1))
    rows = [tag("tr", tag("th", ""), *(tag("th", block, scope="col") for block in blocks))]
    body = []
    for module in modules:
        cells = [tag("th", module, scope="row")]
        for block in blocks:
            value = grid.get((module, block))
            if value is None:
                cells.append(tag("td", class_="none"))
                continue
            style, text = look(value)
            cells.append(tag("td", text, class_=style, title=f"{module}, block {block}: {value:.4g}"))
        body.append(tag("tr", *cells))
    return tag("div", tag("table", tag("thead", *rows), tag("tbody", *body), class_=kind), class_="scroll")


def shade(value: float, low: float, high: float) -> tuple[str, str]:
    """Class and text of a value's cell, on a logarithmic scale from ``low`` to ``high``."""
    if not 0 < value < math.inf:
        return ("h0", "") if value == 0 else ("none", "!")
    share = math.log(value / low) / math.log(high / low) if high > low else 0.0
    return f"h{round(share * (LEVELS - 1))}", ""


def chart(series: Mapping[str, Mapping[int, float]], across: str, up: str) -> Html:
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
        parts.append(tag("line", x1=left, x2=at(last, 0)[0], y1=level, y2=level, class_="grid"))
        parts.append(tag("text", f"{number * step:.3g}", x=_LEFT - 6, y=float(level) + 4, text_anchor="end"))
    for x in range(0, last + 1, max(1, math.ceil(last / 16))):
        parts.append(tag("text", x, x=at(x, 0)[0], y=_HEIGHT - _BELOW + 15, text_anchor="middle"))
    parts.append(tag("text", across, x=at(last, 0)[0], y=_HEIGHT - 4, text_anchor="end"))
    legend = []
    for number, (name, curve) in enumerate(finite.items()):
        points = " ".join(",".join(at(x, y)) for x, y in curve.items())
        parts.append(tag("polyline", points=points, class_=f"s{number}"))
        for x, y in curve.items():
            told = tag("title", f"{name}, {across} {x}: {y:.5g}")
            parts.append(tag("circle", told, cx=at(x, y)[0], cy=at(x, y)[1], r=3, class_=f"s{number}"))
        legend.append(tag("span", f"● {name} ", class_=f"s{number}"))
    svg = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=up)
    caption = tag("figcaption", f"{up}: ", *legend)
    return tag("figure", caption, tag("div", svg, class_="scroll"))


def _step(largest: float) -> float:
    """A round number, of which three to seven make the largest."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest / 3))
    return next(unit * factor for factor in (1, 2, 5, 10) if largest <= 7 * unit * factor)
