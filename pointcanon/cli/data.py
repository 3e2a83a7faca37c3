"""``pointcanon data``: what is at a data root, and which data sets there are."""

from __future__ import annotations

import json
from pathlib import Path

from pointcanon.cli.options import Parser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    from pointcanon.datasets.check import LAYOUTS

    parser = Parser(prog="pointcanon data", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    checking = actions.add_parser("check", help="layout, frame, counts, duplicates, bad files")
    checking.add_argument("--data.root", dest="root", required=True)
    checking.add_argument("--data.layout", dest="layout", choices=LAYOUTS)
    checking.add_argument("--data.variant", dest="variant", help="of ScanObjectNN")
    checking.add_argument("--json", type=Path, default=None, help="write the report here as well")
    actions.add_parser("list", help="the data sets that can be named")
    options = parser.parse_args(argv)
    if options.action == "list":
        from pointcanon import datasets

        print("\n".join(datasets.REGISTRY))
        return 0
    return _check(options.root, options.layout, options.variant, options.json)


def _check(root: str, layout: str | None, variant: str | None, file: Path | None) -> int:
    from rich.console import Console

    from pointcanon.datasets.check import check
    from pointcanon.files import atomic_write, require_writable

    if file is not None:
        require_writable(file)
    report = check(root, layout=layout, variant=variant)
    report.render(Console())
    if file is not None:
        atomic_write(file, json.dumps(report.to_dict(), indent=2) + "\n")
    return 0 if report.ok else 1
