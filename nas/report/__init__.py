"""The report of a run: one HTML page that opens offline, and the front as a terminal table."""

from nas.report.page import write_report
from nas.report.terminal import front_table

__all__ = ["front_table", "write_report"]
