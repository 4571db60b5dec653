"""A run on one page: ``report.html``, which needs nothing but a browser.

What a report holds may come from a stranger's checkpoint. Every text is escaped where a tag is made of it, and the page
itself forbids its browser to load anything, or to run any other script than its own.
"""

import base64
import hashlib
import logging
import os
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import CheckpointError
from ..report import Report, load_report
from .markup import tag
from .sections import sections, title_of

logger = logging.getLogger(__name__)

PAGE_FILE = "report.html"


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


def leave_page(report: Report, file: Path) -> None:
    """Show a run that has ended in ``file``. A model is not lost because a page about it cannot be written."""
    try:
        logger.info("What was done to every layer: %s", write_page(report, file))
    except (OSError, ValueError, LookupError, ArithmeticError) as error:
        logger.warning("%s cannot be written: %s", file, error)


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
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        tag("title", title_of(report)),
        f"<style>{style}</style>",
    )
    lines = ("<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *sections(report))
    return "\n".join((*lines, f"<script>{script}</script>", "</body>", "</html>", ""))


def _hash(text: str) -> str:
    """How a content security policy names a style or a script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
