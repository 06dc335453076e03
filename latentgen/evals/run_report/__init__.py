"""One page about a run: `write_report` makes `report.html` from what is in the run folder."""

from __future__ import annotations

from latentgen.evals.run_report.page import write_report

__all__ = ["write_report"]
