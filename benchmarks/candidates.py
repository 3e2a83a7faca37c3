"""How near the candidates of PCA and Manhattan frames come to the data's own pose.

    python benchmarks/candidates.py --root DATA --predictor FILE

On validation clouds of ModelNet40, none of which any of these has learned from: angles between the
data's pose and the nearest candidate, and the accuracy of a frozen predictor in the pose of that
candidate (what a perfect choice would give, without refinement) beside its accuracy upright.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import pointcanon as pc
from pointcanon import datasets, rotations
from pointcanon.canonicalizers import PCA, Manhattan, Union


def shares(angles: Tensor) -> str:
    under = "  ".join(
        f"<{limit} {100 * (angles < limit).float().mean():.0f} %" for limit in (5, 10)
    )
    return f"median {angles.median():.1f}  {under}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of ModelNet40")
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--clouds", type=int, default=500)
    options = parser.parse_args()
    data = datasets.load("modelnet40", options.root, "val", num_points=1024)
    chosen = torch.linspace(0, len(data) - 1, options.clouds).long().tolist()
    points = torch.stack([data[index]["points"] for index in chosen])
    labels = torch.tensor([int(data.labels[index]) for index in chosen])
    predictor = pc.predictors.load(options.predictor)

    def accuracy(posed: Tensor) -> float:
        with torch.no_grad():
            found = torch.cat([predictor(part).argmax(dim=1) for part in posed.split(50)])
        return 100 * float((found == labels).float().mean())

    centred = points - points.mean(dim=1, keepdim=True)
    print(f"{len(points)} clouds; predictor upright {accuracy(centred):.1f} %")
    proposals = {
        "PCA(24)": PCA(24),
        "Manhattan(24)": Manhattan(24),
        "both": Union([Manhattan(24), PCA(24)]),
    }
    for name, proposal in proposals.items():
        frames = torch.cat([proposal(part).rotations for part in points.split(50)])
        angles = rotations.geodesic_angle(frames, torch.eye(3).expand_as(frames)).rad2deg()
        up = frames[..., 1, 1].clamp(-1, 1).acos().rad2deg().amin(dim=1)
        best = frames[torch.arange(len(frames)), angles.argmin(dim=1)]
        print(f"{name:14} angle {shares(angles.amin(dim=1))}   up axis {shares(up)}")
        print(f"{'':14} predictor with the nearest candidate {accuracy(centred @ best):.1f} %")


if __name__ == "__main__":
    main()
