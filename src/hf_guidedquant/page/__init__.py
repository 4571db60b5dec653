"""A run on one page: ``report.html``, which needs nothing but a browser."""

from .document import PAGE_FILE, leave_page, report_page, write_page

__all__ = ["PAGE_FILE", "leave_page", "report_page", "write_page"]
