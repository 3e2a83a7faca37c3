"""Label the parts of objects in any pose, and measure it by mIoU.

    python examples/part_segmentation.py

A PointNet learns the parts of the built-in shapes, upright, for a few epochs. Under rotation it
fails; behind a canonicalizer its score no longer depends on the pose. The longer both are trained,
the less the canonicalizer costs: the recipes shapes-pointnet-parts and
shapes-pointnet-parts-canonicalizer do it in full.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import pointcanon as pc
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.eval.evaluate import evaluate
from pointcanon.predictors import PointNetParts


def trained(shapes: ParametricShapes, epochs: int) -> PointNetParts:
    network = PointNetParts(
        num_parts=len(shapes.parts),
        num_categories=len(shapes.classes),
        transforms=False,
        widths=(32, 64, 64),
        embedding=128,
    )
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in DataLoader(shapes, 32, shuffle=True):
            optimizer.zero_grad()
            logits = network(batch["points"], category=batch["label"])
            cross_entropy(logits.flatten(0, 1), batch["parts"].flatten()).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="of the PointNet")
    parser.add_argument("--minutes", type=float, default=0.4, help="of the canonicalizer, at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = ParametricShapes("train", num_points=128, size=320)
    held_out = ParametricShapes("test", num_points=128, size=96)

    predictor = trained(shapes, options.epochs)
    model = pc.adapt(predictor, shapes, minutes=options.minutes, progress=False)

    found = evaluate(model, held_out, "I/SO3", seeds=(0,))
    assert found.bare is not None
    print("instance / class mIoU      upright         any pose")
    for name, trials in (("alone", found.bare), ("canonicalized", found.trials)):
        cells = (
            f"{scores.instance_miou:.3f} / {scores.class_miou:.3f}"
            for scores in (trials.aligned, trials.mean)
        )
        print(f"{name:<25}", "   ".join(cells))


if __name__ == "__main__":
    main()
