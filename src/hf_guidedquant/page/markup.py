"""HTML in which every text is escaped where it gets into a tag."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..errors import printable


class Html(str):
    """What is markup already. Every other text is escaped when it gets into a tag."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. ``class_`` is the attribute ``class``; what is None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    told = "".join(f' {key}="{escape(printable(value))}"' for key, value in given.items())
    return Html(f"<{name}{told}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    return Html(
        "".join(str(child) if isinstance(child, Html) else escape(printable(told(child))) for child in children)
    )


def told(value: Any) -> str:
    """A value for readers."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def section(title: str, content: Html | None) -> Html | None:
    return None if content is None else tag("section", tag("h2", title), content)


def table(rows: Iterable[Sequence[Any]], kind: str) -> Html:
    """Two columns: what, and which."""
    return tag("table", join(tag("tr", tag("th", key), tag("td", value)) for key, value in rows), class_=kind)
