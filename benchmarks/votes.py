"""Every vote, of several frozen predictors behind one canonicalizer, from one look at each cloud.

    python benchmarks/votes.py --root DATA --canonicalizer runs/optimized/best.safetensors \\
        --predictor "PointNet=POINTNET" --predictor "DGCNN=runs/dgcnn/best.safetensors:4"

ModelNet40, as it comes and turned by each seed. A predictor after whose file a number stands sees
every so-many-th point only, as in ``fewer_points.py``. The figures are those of ``pointcanon eval``
with each ``--vote``, at a fraction of its time; flips are labels that differ between the clouds as
they come and turned by the first seed, and beside the predictor upright and alone each vote loses
some right answers and gains others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fewer_points import EverySo
from rich.progress import track
from torch import Tensor, nn

from pointcanon import predictors
from pointcanon.cli.options import open_canonicalizer
from pointcanon.datasets import ModelNet40
from pointcanon.datasets.collate import collate
from pointcanon.eval.protocols import pose_rotations
from pointcanon.frames import Frames
from pointcanon.rotations import product

VOTES = ("upright and alone", "certainty", "agreement", "product", "the canonicalizer alone")


def predictor(text: str) -> tuple[str, nn.Module]:
    """A name and a network, from ``NAME=FILE`` or ``NAME=FILE:EVERY``."""
    name, _, file = text.partition("=")
    file, _, every = file.partition(":")
    network = predictors.load(file).eval()
    return name, EverySo(network, int(every)) if every else network


def answers(network: nn.Module, frames: Frames, points: Tensor) -> Tensor:
    """``(B, K, C)``, zero in the frames without weight, which are not asked about."""
    asked = frames.log_weights > -torch.inf
    found = network(frames.apply(points)[asked])
    every = found.new_zeros(*asked.shape, found.shape[-1])
    every[asked] = found
    return every


def labels(network: nn.Module, frames: Frames, points: Tensor) -> dict[str, Tensor]:
    """Of each vote ``(B,)``."""
    assert frames.class_logits is not None
    opinion = frames.class_logits.log_softmax(dim=-1)
    found = answers(network, frames, points)
    agreed = found[torch.arange(len(found)), frames.agreeing(found, opinion)]
    voted = {
        "certainty": frames.vote_logits(found, by_certainty=True),
        "agreement": agreed,
        "product": agreed.log_softmax(dim=-1) + opinion,
        "the canonicalizer alone": opinion,
    }
    return {vote: logits.argmax(dim=-1) for vote, logits in voted.items()}


def accuracies(predicted: Tensor, truth: Tensor) -> str:
    """Overall and mean class accuracy."""
    right = (predicted == truth).double()
    count = truth.bincount()
    by_class = right.new_zeros(len(count)).index_add(0, truth, right)[count > 0] / count[count > 0]
    return f"{100 * right.mean():.1f} / {100 * by_class.mean():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--canonicalizer", required=True, help="as of pointcanon eval")
    parser.add_argument("--predictor", type=predictor, action="append", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--limit", type=int, help="clouds at even strides")
    options = parser.parse_args()
    front = open_canonicalizer(options.canonicalizer).eval()
    data = ModelNet40(options.root, options.split)
    chosen = torch.linspace(0, len(data) - 1, options.limit or len(data)).long()
    turns = [torch.eye(3).expand(len(data), 3, 3)]
    up = data.coordinate_frame.up_axis
    turns += [pose_rotations("SO3", len(data), up, seed=seed) for seed in options.seeds]
    truth: list[Tensor] = []
    said: dict[tuple[str, str], list[list[Tensor]]] = {}
    for rows in track(chosen.split(32), transient=True):
        batch = collate([data[int(row)] for row in rows])
        truth.append(batch["label"])
        centred = batch["points"] - batch["points"].mean(dim=1, keepdim=True)
        for pose, turn in enumerate(turns):
            with torch.no_grad():
                points = product(batch["points"], turn[rows].to(batch["points"]).mT)
                frames = front(points)
                for name, network in options.predictor:
                    found = labels(network, frames, points)
                    if pose == 0:
                        found["upright and alone"] = network(centred).argmax(dim=-1)
                    for vote, label in found.items():
                        poses = said.setdefault((name, vote), [[] for _ in turns])
                        poses[pose].append(label)
    print(f"{len(chosen)} clouds; overall / mean class accuracy %")
    heads = ["as they come", *(f"SO(3), seed {seed}" for seed in options.seeds)]
    heads += ["flips"] * bool(options.seeds) + ["lost / gained"]
    print(f"| | vote | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
    for name, _ in options.predictor:
        for vote in VOTES:
            poses = [torch.cat(pose) for pose in said[name, vote] if pose]
            cells = [accuracies(pose, torch.cat(truth)) for pose in poses]
            if len(poses) > 1:
                cells.append(f"{100 * (poses[0] != poses[1]).double().mean():.2f} %")
            cells += [""] * (len(heads) - 1 - len(cells))
            right, upright = (
                torch.cat(each) == torch.cat(truth)
                for each in (said[name, vote][0], said[name, VOTES[0]][0])
            )
            moved = f"{(upright & ~right).sum()} / {(right & ~upright).sum()}"
            cells.append("" if vote == VOTES[0] else moved)
            print(f"| {name} | {vote} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
