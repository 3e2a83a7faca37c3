"""Make a network of your own work at every orientation.

    python examples/adapt_own_network.py --minutes 0.5 --out robust.safetensors

The network below stands for yours: it wants channels first, as much published code does, and was
trained on upright objects. Nothing in it is changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import pointcanon as pc
from pointcanon import checkpoint
from pointcanon.datasets.parametric import ParametricShapes


@checkpoint.register  # so that a file with it can be loaded again
class Mine(nn.Module):
    """From clouds ``(B, 3, N)`` to logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.points = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 128, 1)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, classes))

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"classes": self.classes}

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.points(points).amax(dim=2))


def trained(shapes: ParametricShapes, epochs: int) -> Mine:
    """The network you have."""
    network = Mine(len(shapes.classes))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(epochs):
        for batch in DataLoader(shapes, 32, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(network(batch["points"].mT), batch["label"]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=0.5, help="of training, at most")
    parser.add_argument("--out", type=Path, default=Path("robust.safetensors"))
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = ParametricShapes("train", num_points=128, size=320)

    predictor = pc.predictors.wrap(
        trained(shapes, epochs=10), layout="BCN", num_classes=len(shapes.classes)
    )
    predictor.classes = tuple(shapes.classes)
    predictor.coordinate_frame = "z-up"
    predictor.normalisation = "unit-ball"

    model = pc.adapt(predictor, shapes, minutes=options.minutes, progress=False)
    print(model.report)
    model.save(options.out)
    print(f"the rotation-robust network: {options.out}")


if __name__ == "__main__":
    main()
