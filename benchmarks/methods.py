"""Every canonicalizer on the same real clouds: exactness, stability, pose, time and memory.

    python benchmarks/methods.py --root DATA [--predictor FILE] [--model NAME=FILE ...]
        [--equiadapt PATH]

DATA holds ModelNet40 (its test split is used). PATH holds equiadapt 0.1.2, whose VNSmall is then
measured too (``canonicalizer.py`` says how to get it). Networks without a checkpoint are untrained:
their exactness, stability and cost mean something, their poses do not. ``--model`` adds the
canonicalizer of a trained model, ``--predictor`` adds ``Search``. Stability is the angle between
the best frames of two halves of the points of one object, two samplings of one surface, and of the
cloud with and without noise (standard deviation 0.01 of its radius). Pose is against the data's
own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from canonicalizer import load_vnsmall, row_gram_schmidt
from measure import cost, in_a_process
from torch import Tensor

import pointcanon as pc
from pointcanon import canonicalizers, datasets, rotations, testing
from pointcanon.canonicalizers import Canonicalizer
from pointcanon.frames import Frames

UNTRAINED = {
    "PCA(1)": lambda: canonicalizers.PCA(1),
    "PCA(24)": lambda: canonicalizers.PCA(24),
    "PCA(24), smooth": lambda: canonicalizers.PCA(24, weighting="smooth"),
    "Manhattan(1)": lambda: canonicalizers.Manhattan(1),
    "Manhattan(24)": lambda: canonicalizers.Manhattan(24),
    "VectorNeuron, small": lambda: canonicalizers.VectorNeuron("small"),
    "Steerable": lambda: canonicalizers.Steerable(),
    "Optimized": lambda: canonicalizers.Optimized(),
}


class Equiadapt(Canonicalizer):
    """VNSmall of the peer as its recipes use it; its "rotations" may be reflections."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.network = load_vnsmall(root)(SimpleNamespace(n_knn=20, pooling="mean"))

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        return Frames.of(row_gram_schmidt(self.network(points.mT.contiguous()))[:, None])


def build(name: str, options: argparse.Namespace) -> Canonicalizer:
    torch.manual_seed(0)
    files = dict(entry.split("=", 1) for entry in options.model)
    if name in files:
        return canonicalizers.load(files[name]).eval()
    if name == "equiadapt VNSmall":
        return Equiadapt(options.equiadapt).eval()
    if name == "Search":
        network = pc.predictors.load(options.predictor)
        return canonicalizers.Search(network, budget=options.budget).eval()
    return UNTRAINED[name]().eval()


def clouds(options: argparse.Namespace) -> Tensor:
    """Test clouds at even strides, so that all classes are among them."""
    data = datasets.load("modelnet40", options.root, "test", num_points=options.points)
    chosen = torch.linspace(0, len(data) - 1, options.clouds).long().tolist()
    return torch.stack([data[index]["points"] for index in chosen])


def find(canonicalizer: Canonicalizer, points: Tensor, batch: int = 16) -> Tensor:
    """The best frame of each cloud ``(B, 3, 3)``."""
    with torch.no_grad():
        parts = [canonicalizer(part).best() for part in points.split(batch)]
    return torch.cat([frames.rotations[:, 0] for frames in parts])


def exactness(canonicalizer: Canonicalizer, points: Tensor, turns: Tensor) -> Tensor:
    """Largest entry of ``R(gx) - g R(x)``, ``(B,)``."""
    plain = find(canonicalizer, points).double()
    moved = find(canonicalizer, (points.double() @ turns.mT).to(points.dtype)).double()
    return (moved - turns @ plain).abs().amax(dim=(1, 2))


def quality(name: str, options: argparse.Namespace) -> dict[str, object]:
    canonicalizer, points = build(name, options), clouds(options)
    generator = torch.Generator().manual_seed(1)
    turns = rotations.random_rotations(len(points), generator=generator, dtype=torch.float64)
    single = exactness(canonicalizer, points, turns)
    noise = 0.01 * torch.randn(points.shape, generator=generator)
    frame = find(canonicalizer, points)
    pairs = {
        "halves": (find(canonicalizer, points[:, ::2]), find(canonicalizer, points[:, 1::2])),
        "noise": (frame, find(canonicalizer, points + noise)),
    }
    stable = {
        key: torch.rad2deg(rotations.geodesic_angle(first, second))
        for key, (first, second) in pairs.items()
    }
    exact = exactness(canonicalizer.double(), points[:50].double(), turns[:50])
    up = torch.rad2deg(frame[:, 1, 1].clamp(-1, 1).acos())
    whole = torch.rad2deg(rotations.geodesic_angle(frame, torch.eye(3).expand_as(frame)))
    return {
        "float32_p50": float(single.median()),
        "float32_p99": float(single.quantile(0.99)),
        "float32_max": float(single.max()),
        "float64_max": float(exact.max()),
        **{f"{key}_within_10": float((angle < 10).float().mean()) for key, angle in stable.items()},
        **{f"{key}_median": float(angle.median()) for key, angle in stable.items()},
        "up_within_10": float((up < 10).float().mean()),
        "pose_median": float(whole.median()),
        "up_errors": up.tolist(),
    }


def expense(name: str, options: argparse.Namespace) -> dict[str, float]:
    canonicalizer = build(name, options)
    points = testing.surface_clouds(options.batch, options.points)  # no data files in the memory

    def run() -> Frames:
        with torch.no_grad():
            return canonicalizer(points)

    found = canonicalizer(points[:1, :64])
    figures = cost(run, options.repeats)
    return {
        "frames": found.count,
        "parameters": sum(p.numel() for p in canonicalizer.parameters()),
        "ms": 1000 * figures["seconds"] / len(points),
        "cpu_ms": 1000 * figures["cpu_seconds"] / len(points),
        "extra_mib": figures["extra_mib"],
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "frames": lambda row: f"{row['frames']}",
    "CPU ms": lambda row: f"{row['cpu_ms']:.2g}",
    "MiB": lambda row: f"{row['extra_mib']:.0f}",
    "float32 p50 / p99 / max": lambda row: " / ".join(
        f"{row[f'float32_{of}']:.0e}" for of in ("p50", "p99", "max")
    ),
    "float64 max": lambda row: f"{row['float64_max']:.0e}",
    "other half": lambda row: f"{100 * row['halves_within_10']:.0f} %",
    "noise": lambda row: f"{100 * row['noise_within_10']:.0f} %",
    "up within 10°": lambda row: f"{100 * row['up_within_10']:.0f} %",
    "median angle": lambda row: f"{row['pose_median']:.0f}°",
}


def table(report: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(cell(row) for cell in COLUMNS.values())] for name, row in report.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(report: dict[str, dict[str, Any]], path: Path) -> None:
    """Share of clouds whose up axis is found within an angle, against the angle.

    Of what has been trained or searches, and of the candidates that a scorer chooses among.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 3.6), layout="constrained")
    left_out = {name for name in UNTRAINED if not name.endswith("(24)")} | {"equiadapt VNSmall"}
    rows = [(name, row) for name, row in report.items() if name not in left_out]
    for name, row in sorted(rows, key=lambda pair: -pair[1]["up_within_10"]):
        errors = torch.tensor(row["up_errors"]).sort().values
        axes.plot(errors, 100 * torch.arange(1, len(errors) + 1) / len(errors), label=name)
    axes.axvline(10, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="error of the up axis, degrees", ylabel="test clouds, %", xlim=(0, 90))
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of ModelNet40")
    parser.add_argument("--predictor", type=Path, help="frozen network for Search")
    parser.add_argument("--budget", type=int, default=24, help="passes of Search")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--equiadapt", type=Path, help="folder that holds equiadapt/")
    parser.add_argument("--only", action="append", help="these methods alone")
    parser.add_argument("--clouds", type=int, default=200)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of the up-axis errors")
    parser.add_argument("--expense", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.expense is not None:
        print(json.dumps(expense(options.expense, options)))
        return
    names = [*UNTRAINED, *(["Search"] if options.predictor else [])]
    names += ["equiadapt VNSmall"] if options.equiadapt else []
    names += [entry.split("=", 1)[0] for entry in options.model]
    report: dict[str, dict[str, Any]] = {}
    for name in options.only or names:
        given = argparse.Namespace(**{k: v for k, v in vars(options).items() if k != "only"})
        given.json = given.plot = None
        report[name] = {**in_a_process(__file__, given, expense=name), **quality(name, options)}
        print(table({name: report[name]}).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot is not None:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
