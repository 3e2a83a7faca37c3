"""Public repositories' own networks beside ours on the same weights: how far the outputs differ.

    git clone https://github.com/yanx27/Pointnet_Pointnet2_pytorch
    python benchmarks/parity.py --yanx27 Pointnet_Pointnet2_pytorch

takes checkouts of any of the repositories below. Their model code is run as it is, with random
weights whose running statistics fit the clouds; its state dictionary is written the way its
training script writes it, read by ``predictors.load``, and both networks see the same clouds, in
evaluation mode, in float32 and in float64. What they return as log-probabilities is compared as
such; ``rounding`` is how far theirs differs between float32 and float64, and ``spread`` how far it
varies from cloud to cloud. Two things are changed from outside: the device, where theirs is fixed
to CUDA, and the point that farthest-point sampling begins with, random there and the one farthest
from the centroid here. In float32 a point within 1e-7 of the surface of a ball may fall inside for
one and outside for the other, and neighbours may be told apart by less than rounding; float64 shows
what is left without such ties.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pointcanon import predictors, testing
from pointcanon.clouds import centroid, normalise

CLOUDS = 4


class Case(NamedTuple):
    """Their network, what it takes beside positions, and how its script saves it."""

    name: str
    network: nn.Module
    normals: bool = False
    categories: int = 0
    layout: str = "BCN"
    points: int = 1024
    save: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda state: state


class TorchOnCPU:
    """``torch`` as their modules see it, where they ask for a CUDA device by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu")


def module_at(path: Path, name: str) -> Any:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"there is no {path}: pass the folder of a checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def yanx27(root: Path) -> Iterator[Case]:
    def save(state: dict[str, Tensor]) -> dict[str, Any]:
        return {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}}

    sys.path[:0] = [str(root), str(root / "models")]
    for name in ("models.pointnet2_utils", "pointnet2_utils"):
        utils = importlib.import_module(name)
        begin_at_the_farthest(utils)
    for normals in (False, True):
        for name in ("pointnet_cls", "pointnet2_cls_ssg", "pointnet2_cls_msg"):
            network = importlib.import_module(name).get_model(40, normal_channel=normals)
            yield Case(f"yanx27 {name}", network, normals, save=save)
        for kind in ("pointnet_part_seg", "pointnet2_part_seg_ssg", "pointnet2_part_seg_msg"):
            network = importlib.import_module(kind).get_model(50, normal_channel=normals)
            yield Case(f"yanx27 {kind}", network, normals, categories=16, points=2048, save=save)


class TorchWithStart:
    """``torch`` as their sampling sees it, whose random start is the one it is told."""

    start: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randint(self, *arguments: object, **options: object) -> Tensor:
        return self.start


def begin_at_the_farthest(utils: Any) -> None:
    """Their sampling, begun with the point farthest from the centroid."""
    sample, utils.torch = utils.farthest_point_sample, TorchWithStart()

    def begun(points: Tensor, count: int) -> Tensor:
        squared = (points - centroid(points)[:, None]).square().sum(dim=-1)
        utils.torch.start = squared.argmax(dim=1)
        return sample(points, count)

    utils.farthest_point_sample = begun


def fxia22(root: Path) -> Iterator[Case]:
    models = module_at(root / "pointnet" / "model.py", "fxia22_model")
    for second in (False, True):
        yield Case("fxia22 PointNetCls", models.PointNetCls(16, feature_transform=second))
        network = models.PointNetDenseCls(4, feature_transform=second)
        yield Case("fxia22 PointNetDenseCls", network, points=2500)


def learning3d(root: Path) -> Iterator[Case]:
    package = types.ModuleType("learning3d_models")  # its own __init__ imports far more
    package.__path__ = [str(root / "models")]
    sys.modules[package.__name__] = package
    pointnet = importlib.import_module("learning3d_models.pointnet")
    classifier = importlib.import_module("learning3d_models.classifier")
    network = classifier.Classifier(pointnet.PointNet(emb_dims=1024, use_bn=True))
    yield Case("learning3d PointNet", network, layout="BNC")


def dgcnn(path: Path, owner: str) -> Iterator[Case]:
    def save(state: dict[str, Tensor]) -> dict[str, Any]:
        return {f"module.{key}": value for key, value in state.items()}

    models = module_at(path, f"{owner}_model")
    models.torch = TorchOnCPU()
    options = types.SimpleNamespace(k=20, emb_dims=1024, dropout=0.5)
    classifier = getattr(models, "DGCNN_cls", None) or models.DGCNN
    yield Case(f"{owner} DGCNN", classifier(options), save=save)
    if hasattr(models, "DGCNN_partseg"):
        options = types.SimpleNamespace(k=40, emb_dims=1024, dropout=0.5)
        network = models.DGCNN_partseg(options, 50)
        yield Case(f"{owner} DGCNN_partseg", network, categories=16, points=2048, save=save)


REPOSITORIES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "yanx27": yanx27,
    "fxia22": fxia22,
    "learning3d": learning3d,
    "antao97": lambda root: dgcnn(root / "model.py", "antao97"),
    "wangyueft": lambda root: dgcnn(root / "pytorch" / "model.py", "WangYueFt"),
}


def answer(case: Case, points: Tensor, normals: Tensor, category: Tensor) -> Tensor:
    """Log-probabilities ``(B, C)`` or ``(B, N, C)`` of their network."""
    cloud = torch.cat((points, normals), dim=-1) if case.normals else points
    extra = [nn.functional.one_hot(category, case.categories).to(points)] if case.categories else []
    found = case.network(cloud.mT if case.layout == "BCN" else cloud, *extra)
    found = found[0] if isinstance(found, tuple) else found
    if case.categories and found.shape[1] != points.shape[1]:
        found = found.mT
    return found.log_softmax(dim=-1)


@torch.no_grad()
def differences(case: Case) -> dict[str, float]:
    """Largest differences of log-probabilities, and their standard deviation over the clouds."""
    generator = torch.Generator().manual_seed(0)
    shapes = 0.3 + torch.rand(CLOUDS, 1, 3, generator=generator)
    points = normalise(shapes * testing.surface_clouds(CLOUDS, case.points, generator))
    normals = nn.functional.normalize(torch.randn(points.shape, generator=generator), dim=-1)
    category = torch.arange(CLOUDS) % max(1, case.categories)
    norms = []
    for module in case.network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            module.momentum = None  # statistics of the one batch that follows
            norms.append(module)
    answer(case, points, normals, category)
    case.network.eval()
    for norm in norms:  # what few clouds hardly vary would be blown up as no training does
        norm.running_var.clamp_(min=0.01)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(case.save(case.network.state_dict()), path)
        ours = predictors.load(path)
    figures, theirs = {}, []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        case.network.to(dtype)
        ours.to(dtype)
        given = points.to(dtype), normals.to(dtype)
        expected = answer(case, *given, category)
        extras: dict[str, Tensor] = {"normals": given[1]} if case.normals else {}
        if case.categories:
            extras["category"] = category
        found = ours(given[0], **extras).log_softmax(dim=-1)
        figures[str(dtype).removeprefix("torch.")] = float((found - expected).abs().max())
        theirs.append(expected)
    torch.set_default_dtype(torch.float32)
    figures["rounding"] = float((theirs[0] - theirs[1]).abs().max())
    figures["spread"] = float(expected.std(dim=0).mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in REPOSITORIES:
        parser.add_argument(f"--{name}", type=Path, help="folder of a checkout")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    roots = {name: getattr(options, name) for name in REPOSITORIES if getattr(options, name)}
    if not roots:
        parser.error("give at least one checkout")
    torch.manual_seed(0)
    report = {}
    columns = ("float32", "float64", "rounding", "spread")
    print(f"{'largest difference of log-probabilities':46}" + "".join(f"{c:>10}" for c in columns))
    for name, root in roots.items():
        for case in REPOSITORIES[name](root.resolve()):
            title = f"{case.name}{', normals' if case.normals else ''}"
            figures = differences(case)
            report[title] = figures
            print(f"{title:46}" + "".join(f"{figures[c]:>10.1e}" for c in columns), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
