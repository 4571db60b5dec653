"""A run on one page: ``report.html``, which needs nothing but a browser."""

from .document import PAGE_FILE, report_page, write_page

__all__ = ["PAGE_FILE", "report_page", "write_page"]
