"""What posing clouds adds to an inference of DGCNN: time and memory, side by side in one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --batch 1 --repeats 10

Beside both forms of DGCNN, the plain one of public code and the one without edges (``dgcnn.py``),
stands the canonicalizer that comes with the package, as it is and with fewer looks. Each time is
also a share of both forms. Further passes of the predictor come on top: ``pointcanon eval`` counts
them. Each measurement runs in a process of its own; nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import dgcnn
import torch
from measure import cost, in_a_process
from torch import Tensor

from pointcanon import canonicalizers, neighbors, testing

SETTINGS: dict[str, dict[str, object]] = {
    "canonicalizer": {},
    "canonicalizer, one look": {"looks": 1},
    "canonicalizer, one look at 128 points, 3 refined": {"looks": 1, "points": 128, "keep": 3},
}
NETWORKS = {"DGCNN, plain": "plain", "DGCNN": "pointcanon"}


def build(options: argparse.Namespace) -> Callable[[Tensor], object]:
    if options.what in NETWORKS:
        settings = {"network": "classes", "k": 20, "who": NETWORKS[options.what]}
        network, forward = dgcnn.build(argparse.Namespace(**settings))
        network.eval()
        return forward
    canonicalizer = canonicalizers.load(options.canonicalizer)
    return canonicalizer.with_options(**SETTINGS[options.what]).eval()


def measure(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    run = build(options)
    points = testing.surface_clouds(options.batch, options.points)
    with torch.no_grad():
        run(points[:2])  # libraries load their kernels here
        return cost(lambda: run(points), options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--canonicalizer", default="modelnet40", help="a name or a file")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what is not None:
        print(json.dumps(measure(options)))
        return
    print(
        f"B = {options.batch}, N = {options.points}, float32, {options.threads} threads; "
        f"torch {torch.__version__}; {neighbors.backend()}\n"
    )
    found = {what: in_a_process(__file__, options, what=what) for what in (*NETWORKS, *SETTINGS)}
    print("| | ms a cloud | of plain DGCNN | of DGCNN | MiB |\n|---|---|---|---|---|")
    plain, ours = (found[network]["cpu_seconds"] for network in NETWORKS)
    for what, figures in found.items():
        seconds = figures["cpu_seconds"]
        shares = " | ".join(f"{100 * seconds / whole:.0f} %" for whole in (plain, ours))
        milliseconds = 1e3 * seconds / options.batch
        print(f"| {what} | {milliseconds:.1f} | {shares} | {figures['extra_mib']:.0f} |")


if __name__ == "__main__":
    main()
