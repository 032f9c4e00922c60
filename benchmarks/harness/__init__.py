"""What every question needs: servers, load, timing, bars, results, pages."""

from benchmarks.harness.bars import Bar, median_bar, ratio_bar
from benchmarks.harness.markdown import LOAD, Columns, table
from benchmarks.harness.question import Options
from benchmarks.harness.results import Row, of_kind

__all__ = ["LOAD", "Bar", "Columns", "Options", "Row", "median_bar", "of_kind", "ratio_bar", "table"]
