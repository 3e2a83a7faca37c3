"""DGCNN without edges beside its plain form: time, memory, and what is left to gain.

    python benchmarks/dgcnn.py
    python benchmarks/dgcnn.py --network parts --points 2048 --k 40 --batch 4
    python benchmarks/dgcnn.py --way bf16
    python benchmarks/dgcnn.py --way compiled

The plain form is written here the way public code has it: all pairwise distances and their topk,
edges as a tensor (B, 2C, N, k), convolutions of size one on it. Both use the same weights and run
in this one session, each measurement in a process of its own so that peak memory is its own.
``floor`` is the time of the matrix products that no form can do without, k-NN aside, at the speed
of the largest of them alone. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import cost, in_a_process
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pointcanon import neighbors, testing
from pointcanon.layers import edge_conv
from pointcanon.layers.edge_conv import DeepEdgeConv, EdgeConv, Layer
from pointcanon.layers.pointwise import PooledLinear
from pointcanon.predictors import DGCNN, DGCNNParts

NETWORKS: dict[str, Callable[[int], DGCNN | DGCNNParts]] = {
    "classes": lambda k: DGCNN(40, k=k, dropout=0.0),
    "parts": lambda k: DGCNNParts(50, num_categories=16, k=k, dropout=0.0),
}


def plain_knn(features: Tensor, k: int) -> Tensor:
    """``(B, C, N)`` to ``(B, N, k)``."""
    squares = features.square().sum(dim=1, keepdim=True)
    return (2 * features.mT @ features - squares - squares.mT).topk(k, dim=-1).indices


def plain_edges(features: Tensor, k: int) -> Tensor:
    """``(B, C, N)`` to ``(B, 2C, N, k)``."""
    batch, channels, count = features.shape
    index = edge_conv.knn(features, k) + torch.arange(batch)[:, None, None] * count
    rows = features.mT.reshape(batch * count, channels)
    ends = rows[index.flatten()].view(batch, count, k, channels)
    centres = rows.view(batch, count, 1, channels).repeat(1, 1, k, 1)
    return torch.cat((ends - centres, centres), dim=-1).permute(0, 3, 1, 2).contiguous()


def plain_layer(layer: nn.Module | None, features: Tensor) -> Tensor:
    """Convolution of size one, normalisation, leaky ReLU: ``(B, C, ...)`` to ``(B, D, ...)``."""
    assert isinstance(layer, Layer | PooledLinear)
    kernel = layer.linear.weight.unflatten(1, (-1, *(1,) * (features.ndim - 2)))
    convolution = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[features.ndim]
    norm = layer.norm
    normalised = F.batch_norm(
        convolution(features, kernel, layer.linear.bias),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        layer.training,
    )
    return F.leaky_relu(normalised, edge_conv.SLOPE)


def plain_edge_conv(convolution: nn.Module, features: Tensor) -> Tensor:
    assert isinstance(convolution, EdgeConv | DeepEdgeConv)
    edges = plain_edges(features, convolution.k)
    layers = [convolution.layer] if isinstance(convolution, EdgeConv) else convolution.layers
    for layer in layers:
        edges = plain_layer(layer, edges)
    return edges.max(dim=-1).values


def plain_levels(network: DGCNN | DGCNNParts, points: Tensor) -> Tensor:
    """Features of all edge convolutions side by side, ``(B, sum of C, N)``."""
    features, levels = points.mT.contiguous(), []
    for convolution in network.edges:
        features = plain_edge_conv(convolution, features)
        levels.append(features)
    return torch.cat(levels, dim=1)


def plain_dgcnn(network: DGCNN, points: Tensor) -> Tensor:
    shared = plain_layer(network.shared, plain_levels(network, points))
    maximum, mean = F.adaptive_max_pool1d(shared, 1), F.adaptive_avg_pool1d(shared, 1)
    return network.head(torch.cat((maximum, mean), dim=1).squeeze(-1))


def plain_dgcnn_parts(network: DGCNNParts, points: Tensor, category: Tensor) -> Tensor:
    align = network.align
    code = plain_layer(align.pool, plain_edge_conv(align.edges, points.mT.contiguous()))
    matrix = align.matrix(align.head(code.max(dim=-1).values)).view(-1, 3, 3)
    local = plain_levels(network, points @ matrix)
    code = plain_layer(network.pool, local).max(dim=-1).values
    kind = plain_layer(network.category, F.one_hot(category, 16).to(points.dtype))
    code = torch.cat((code, kind), dim=1)[..., None].expand(-1, -1, points.shape[1])
    features = torch.cat((code, local), dim=1)
    for layer in (network.joint, *network.head):
        features = plain_layer(layer, features)
    return network.logits(features.mT)


def build(options: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network, and the function from clouds to logits that is to be measured."""
    torch.manual_seed(0)
    network = NETWORKS[options.network](options.k)
    plain = options.who == "plain"
    if plain:
        edge_conv.knn = plain_knn
    if isinstance(network, DGCNNParts):
        run = (
            (lambda *inputs: plain_dgcnn_parts(network, *inputs))
            if plain
            else (lambda points, category: network(points, category=category))
        )
        return network, lambda points: run(points, torch.arange(len(points)) % 16)
    return network, (lambda points: plain_dgcnn(network, points)) if plain else network


def another_way(forward: Callable[[Tensor], Tensor], way: str) -> Callable[[Tensor], Tensor]:
    """The same function, compiled or with its matrix products in bfloat16."""
    if way == "compiled":
        return torch.compile(forward)
    return torch.autocast("cpu", dtype=torch.bfloat16)(forward) if way == "bf16" else forward


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One inference, or one training step: forward, backward and SGD."""
    torch.set_num_threads(options.threads)
    network, forward = build(options)
    network.train(options.what == "training")
    forward = another_way(forward, "float32" if options.who == "plain" else options.way)
    points = testing.surface_clouds(options.batch, options.points)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        logits = forward(points).flatten(0, -2)
        labels = torch.arange(len(logits)) % logits.shape[1]
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad():
            forward(points)

    # libraries load their kernels here, and a compiler does its work
    if options.way == "compiled":
        (step if options.what == "training" else infer)()
    else:
        with torch.no_grad():
            forward(points[:2, : 2 * options.k])
    exact, spent = edge_conv.knn, [0.0]

    def timed_knn(*inputs: object) -> Tensor:
        start = time.process_time()
        index = exact(*inputs)  # type: ignore[arg-type]
        spent[0] += time.process_time() - start
        return index

    if options.way != "compiled":  # a clock has no place in a program
        edge_conv.knn = timed_knn
    figures = cost(step if options.what == "training" else infer, options.repeats)
    return figures | {"knn_cpu_seconds": spent[0] / options.repeats}


def floor(options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of the matrix products of ours, at the speed of the largest of them."""
    torch.set_num_threads(options.threads)
    network, forward = build(options)
    points = testing.surface_clouds(options.batch, options.points)
    network.train(options.what == "training")
    with FlopCounterMode(display=False) as counter:  # sees nothing of what k-NN does inside
        logits = forward(points)
        if options.what == "training":
            logits.sum().backward()
    rows, weight = torch.randn(options.batch * options.points, 512), torch.randn(512, 1024)
    best = cost(lambda: rows @ weight, 2 * options.repeats)["cpu_seconds"]
    return {"seconds": counter.get_total_flops() * best / (2 * rows.numel() * weight.shape[1])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="classes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--way",
        choices=("float32", "bf16", "compiled"),
        default="float32",
        help="of the form without edges: as it is, under autocast, or through torch.compile",
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--who", choices=("pointcanon", "plain", "floor"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("inference", "training"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what is not None:
        print(json.dumps((floor if options.who == "floor" else measure)(options)))
        return

    print(
        f"{options.network}: B = {options.batch}, N = {options.points}, k = {options.k}, "
        f"{options.threads} threads, {options.way} beside float32; torch {torch.__version__}; "
        f"{neighbors.backend()}"
    )
    report: dict[str, dict[str, dict[str, float]]] = {}
    for what in ("inference", "training"):
        figures = {
            who: in_a_process(__file__, options, who=who, what=what, json=None)
            for who in ("pointcanon", "plain", "floor")
        }
        ours, theirs = figures["pointcanon"], figures["plain"]
        print(f"{what:22}{'pointcanon':>12}{'plain':>12}{'ratio':>8}")
        for name in ("seconds", "cpu_seconds", "extra_mib", "knn_cpu_seconds"):
            ratio = f"{theirs[name] / ours[name]:.1f}" if ours[name] > 0 else "-"
            print(f"  {name:20}{ours[name]:>12.4g}{theirs[name]:>12.4g}{ratio:>8}")
        share = ours["knn_cpu_seconds"] / ours["cpu_seconds"]
        print(f"  k-NN is {share:.0%}, floor {figures['floor']['seconds']:.2f} CPU seconds")
        report[what] = figures
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
