"""The small vector-neuron canonicalizer beside equiadapt's VNSmall: time, memory, exactness.

    pip download --no-deps equiadapt==0.1.2 && unzip equiadapt-0.1.2-py3-none-any.whl -d PATH
    python benchmarks/canonicalizer.py --equiadapt PATH

Both run in this one session, forward only, each measurement in a process of its own so that peak
memory is its own: the most that was resident during the forward, less what was before it.
equiadapt's package imports torchvision, so its two point-cloud modules are loaded from their files;
they are given parameters as their recipes do (mean pooling, k = 20). Its three vectors become a
rotation by Gram-Schmidt, as in its own recipe. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from measure import cost, in_a_process
from torch import Tensor, nn

from pointcanon import neighbors, rotations, testing
from pointcanon.canonicalizers.vector_neuron import VectorNeuron

PACKAGE = "equiadapt.pointcloud.canonicalization_networks"


def load_vnsmall(root: Path | None) -> type[nn.Module]:
    """equiadapt's ``VNSmall`` from an unpacked wheel or an installed copy, its modules alone."""
    if root is None:
        spec = importlib.util.find_spec("equiadapt")  # finds the package without importing it
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("equiadapt is not installed: pass --equiadapt PATH (see --help)")
        folder = Path(next(iter(spec.submodule_search_locations)))
    else:
        folder = root / "equiadapt" if (root / "equiadapt").is_dir() else root
    folder = folder / "pointcloud" / "canonicalization_networks"
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: pass the folder that holds equiadapt/")
    if importlib.util.find_spec("omegaconf") is None:  # it only names a type there
        sys.modules["omegaconf"] = types.ModuleType("omegaconf")
        sys.modules["omegaconf"].DictConfig = dict  # type: ignore[attr-defined]
    for parent in ("equiadapt", "equiadapt.pointcloud", PACKAGE):
        sys.modules[parent] = types.ModuleType(parent)
    for name in ("vector_neuron_layers", "equivariant_networks"):
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module.VNSmall


def build(who: str, k: int, root: Path | None) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A network in evaluation mode, and how it turns clouds ``(B, N, 3)`` into ``(B, 3, 3)``."""
    torch.manual_seed(0)
    if who == "pointcanon":
        ours = VectorNeuron("small", k=k).eval()
        return ours, lambda points: ours(points).rotations[:, 0]
    parameters = types.SimpleNamespace(n_knn=k, pooling="mean")
    theirs = load_vnsmall(root)(parameters).eval()
    return theirs, lambda points: row_gram_schmidt(theirs(points.mT.contiguous()))


def row_gram_schmidt(vectors: Tensor) -> Tensor:
    """Three rows made orthonormal in turn, as equiadapt does; det may be -1. Frames are columns."""
    rows: list[Tensor] = []
    for vector in vectors.unbind(dim=1):
        for row in rows:
            vector = vector - (vector * row).sum(dim=-1, keepdim=True) * row
        rows.append(vector / vector.norm(dim=-1, keepdim=True))
    return torch.stack(rows, dim=-1)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One forward of B clouds of N points: peak memory of the first, best time of several."""
    torch.set_num_threads(options.threads)
    network, frames = build(options.who, options.k, options.equiadapt)
    points = testing.surface_clouds(options.batch, options.points)
    with torch.no_grad():
        frames(points[:1, :64])  # libraries load their kernels here
        figures = cost(lambda: frames(points), options.repeats)
    return {"parameters": sum(p.numel() for p in network.parameters()), **figures}


def exactness(options: argparse.Namespace) -> dict[str, float]:
    """``|R(gx) - g R(x)|`` in float32 on surface-like clouds, and how often det R is negative."""
    torch.set_num_threads(options.threads)
    _, frames = build(options.who, options.k, options.equiadapt)
    generator = torch.Generator().manual_seed(1)
    points = testing.surface_clouds(options.clouds, options.points, generator)
    points = points - points.mean(dim=1, keepdim=True)  # equiadapt does not centre
    turns = rotations.random_rotations(options.clouds, generator=generator, dtype=torch.float64)
    turned = (points.double() @ turns.mT).float()
    with torch.no_grad():
        plain = torch.cat([frames(part) for part in points.split(8)]).double()
        moved = torch.cat([frames(part) for part in turned.split(8)]).double()
    errors = (moved - turns @ plain).flatten(1).norm(dim=1)
    return {
        "error_p50": float(errors.median()),
        "error_p99": float(errors.quantile(0.99)),
        "error_max": float(errors.max()),
        "mirrored": float((torch.linalg.det(plain) < 0).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--equiadapt", type=Path, help="folder that holds equiadapt/")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clouds", type=int, default=200, help="for the equivariance error")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--who", choices=("pointcanon", "equiadapt"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("measure", "exactness"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what is not None:
        print(json.dumps({"measure": measure, "exactness": exactness}[options.what](options)))
        return

    report: dict[str, dict[str, float]] = {}
    for who in ("pointcanon", "equiadapt"):
        report[who] = in_a_process(__file__, options, who=who, what="measure", json=None)
        report[who] |= in_a_process(__file__, options, who=who, what="exactness", json=None)
    large = in_a_process(
        __file__, options, who="pointcanon", what="measure", batch=1, points=16_384, json=None
    )
    ours, theirs = report["pointcanon"], report["equiadapt"]
    print(
        f"B = {options.batch}, N = {options.points}, k = {options.k}, {options.threads} threads, "
        f"float32, no gradients; torch {torch.__version__}; {neighbors.backend()}"
    )
    print(f"{'':22}{'pointcanon small':>18}{'equiadapt VNSmall':>19}{'ratio':>8}")
    for name in ("parameters", "seconds", "cpu_seconds", "extra_mib"):
        ratio = f"{theirs[name] / ours[name]:.1f}" if ours[name] > 0 else "-"
        print(f"{name:22}{ours[name]:>18.4g}{theirs[name]:>19.4g}{ratio:>8}")
    for name in ("error_p50", "error_p99", "error_max", "mirrored"):
        print(f"{name:22}{ours[name]:>18.2g}{theirs[name]:>19.2g}")
    print(f"one cloud of 16,384 points: {large['extra_mib']:.0f} MiB extra")
    if options.json is not None:
        report["pointcanon, one cloud of 16384 points"] = large
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
