"""PointNet++ beside its plain form: time and peak memory of inference, same weights.

    python benchmarks/pointnet2.py
    python benchmarks/pointnet2.py --scales msg --repeats 2
    python benchmarks/pointnet2.py --yanx27 Pointnet_Pointnet2_pytorch

The plain form is that of the tests, written the way public code has it: a loop over the farthest
points, all distances sorted for the balls, every member of every ball a row of convolutions of size
one. With a checkout of yanx27/Pointnet_Pointnet2_pytorch its own code runs as a third. All run in
this one session, each measurement in a process of its own so that peak memory is its own. Nothing
here asserts a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import cost, in_a_process
from torch import Tensor, nn

from pointcanon import neighbors, predictors, testing
from pointcanon.clouds import normalise

TESTS = Path(__file__).resolve().parents[1] / "tests"


def plain_network(scales: str) -> nn.Module:
    sys.path.insert(0, str(TESTS))
    from public_formats import PublicPointNet2

    torch.manual_seed(0)
    return PublicPointNet2(40, scales).eval()


def their_network(scales: str, root: Path) -> nn.Module:
    sys.path[:0] = [str(root), str(root / "models")]
    models = __import__(f"pointnet2_cls_{scales}")
    return models.get_model(40, normal_channel=False).eval()


def build(options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """From clouds to logits; all networks have the weights of the plain one."""
    plain = plain_network(options.scales)
    if options.who == "plain":
        return plain
    if options.who == "yanx27":
        theirs = their_network(options.scales, options.yanx27)
        theirs.load_state_dict(plain.state_dict())
        return lambda points: theirs(points.mT.contiguous())[0]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(plain.state_dict(), Path(folder) / "weights.pth")
        return predictors.load(Path(folder) / "weights.pth")


def measure(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    forward = build(options)
    points = normalise(testing.surface_clouds(options.batch, options.points))
    with torch.no_grad():
        forward(points[:1])  # libraries load their kernels here
        figures = cost(lambda: forward(points), options.repeats)
        return figures | {"logits_norm": float(forward(points[:1]).log_softmax(dim=-1).norm())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", choices=("ssg", "msg"), default="ssg")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--yanx27", type=Path, help="folder of a checkout")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--who", choices=("pointcanon", "plain", "yanx27"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who is not None:
        print(json.dumps(measure(options)))
        return

    everyone = ["pointcanon", "plain", *(["yanx27"] if options.yanx27 else [])]
    report = {who: in_a_process(__file__, options, who=who, json=None) for who in everyone}
    print(
        f"PointNet++ {options.scales}, B = {options.batch}, N = {options.points}, "
        f"{options.threads} threads, float32, no gradients; torch {torch.__version__}; "
        f"{neighbors.backend()}"
    )
    print(f"{'':14}" + "".join(f"{who:>14}" for who in everyone) + f"{'plain / ours':>14}")
    for name in ("seconds", "cpu_seconds", "extra_mib", "logits_norm"):
        values = [report[who][name] for who in everyone]
        ratio = f"{values[1] / values[0]:.2f}" if values[0] > 0 else "-"
        print(f"{name:14}" + "".join(f"{value:>14.5g}" for value in values) + f"{ratio:>14}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
