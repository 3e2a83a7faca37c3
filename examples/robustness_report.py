"""Compare what can be put in front of a network without training anything.

    pointcanon demo --output demo
    python examples/robustness_report.py demo/predictor/best.safetensors

The network is asked about built-in shapes as they come and in any pose, alone and behind
canonicalizers that have nothing to learn. ``pointcanon audit`` does the same on your own clouds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pointcanon as pc
from pointcanon.canonicalizers import PCA, Canonicalizer, Manhattan
from pointcanon.datasets.parametric import ParametricShapes

IN_FRONT: dict[str, Canonicalizer] = {
    "PCA(1)": PCA(1),
    "PCA(4)": PCA(4),
    "PCA(24)": PCA(24),
    "Manhattan(24)": Manhattan(24),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("network", help="a checkpoint of a classifier of the built-in shapes")
    parser.add_argument("--clouds", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    network = pc.predictors.load(options.network)
    shapes = ParametricShapes("test", num_points=256, size=options.clouds)
    audits = {
        name: pc.audit(network, shapes, canonicalizer=canonicalizer, rotations=2)
        for name, canonicalizer in IN_FRONT.items()
    }
    alone = next(iter(audits.values())).alone
    rows = {"alone": alone, **{name: found.judged for name, found in audits.items()}}

    print("                 upright   any pose   keeps its answer   passes")
    for name, row in rows.items():
        shares = row.score["I"], row.score["SO3"], row.agreement["SO3"]
        upright, turned, kept = (f"{100 * share:.1f} %" for share in shares)
        print(f"{name:<15}{upright:>9}{turned:>11}{kept:>19}{row.passes:>9}")
    if options.json is not None:
        figures = {name: {"score": row.score, "passes": row.passes} for name, row in rows.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
