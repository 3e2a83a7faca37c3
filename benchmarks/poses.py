"""What each pose costs that a network is shown: optimised canonicalization over several groups.

    python benchmarks/poses.py

``Contrastive`` with a small PointNet over the elements of a finite group: processor time a cloud,
of inference and of a training step (forward, contrastive and prior loss, backward). All poses of a
batch of clouds are one batch of the network.
"""

from __future__ import annotations

import argparse

import torch
from measure import cost

from pointcanon import testing
from pointcanon.canonicalizers import PCA, Contrastive, Orbit
from pointcanon.losses import contrastive_loss, prior_loss
from pointcanon.predictors import PointNet
from pointcanon.priors import Aligned

GROUPS = {1: None, 4: "C4", 12: "T", 24: "O", 60: "I"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points = testing.surface_clouds(options.batch, options.points)
    upright, prior = torch.eye(3).expand(options.batch, 3, 3), Aligned(50.0)
    print("| poses | inference, ms | training, ms |\n|---|---|---|")
    for count, group in GROUPS.items():
        torch.manual_seed(0)
        coarse = PCA(1)
        proposal = coarse if group is None else Orbit(coarse, group)
        module = Contrastive(PointNet(64, widths=(32, 64), embedding=128), proposal)

        def infer(module: Contrastive = module) -> None:
            with torch.no_grad():
                module(points)

        def learn(module: Contrastive = module) -> None:
            frames = module(points)
            assert frames.embeddings is not None
            loss = contrastive_loss(frames.embeddings) + prior_loss(frames, prior, upright)
            loss.backward()  # type: ignore[no-untyped-call]

        figures = [1000 * cost(infer, options.repeats)["cpu_seconds"] / options.batch]
        if count > 1:  # among one there is nothing to choose
            module.train()
            figures.append(1000 * cost(learn, options.repeats)["cpu_seconds"] / options.batch)
        cells = " | ".join(f"{figure:.2g}" for figure in figures)
        print(f"| {count} | {cells}{'' if count > 1 else ' | '} |", flush=True)


if __name__ == "__main__":
    main()
