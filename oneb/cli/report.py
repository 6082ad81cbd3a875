"""``oneb report RUN_DIR``: redraw a run's plots, summary and report from its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser


def build_parser() -> argparse.ArgumentParser:
    """The options of ``oneb report``."""
    parser = OptionParser(
        prog="oneb report",
        description="Redraw the plots, the summary and report.html of a run, also while it is training.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run directory: runs/<tag>_<variant>_seed<seed>")
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print their paths; returns the exit code (0, 2 for a user's mistake)."""
    run_dir = build_parser().parse_args(argv).run_dir
    from oneb.inspect.plots import write_plots
    from oneb.inspect.report import write_report
    from oneb.inspect.summary import write_summary

    # Plots first: the others show those that are there.
    for path in [*write_plots(run_dir), write_summary(run_dir), write_report(run_dir)]:
        print(path)
    return 0
