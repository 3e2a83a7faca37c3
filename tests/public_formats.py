"""What others publish: the three layouts of ModelNet, made small, and networks in their plain form.

The networks name their weights as the public repositories do and compute what those compute, step
by step as the papers describe it: the reference for the fast forms, and for reading checkpoints.
Clouds are ``(B, N, C)`` here too; what the repositories return beside the logits is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.datasets.modelnet_layouts import MODELNET10_CLASSES, MODELNET40_CLASSES

BOX = np.array([[x, y, z] for x in (0, 10) for y in (0, 20) for z in (0, 30)], dtype=float)
QUADS = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))


def write_h5(folder: Path, points: int = 64, per_class: int = 10) -> Path:
    """Two train files and a test file, compressed, in lists that name another root."""
    folder = folder / "modelnet40_ply_hdf5_2048"
    folder.mkdir(parents=True)
    (folder / "shape_names.txt").write_text("\n".join(MODELNET40_CLASSES) + "\n")
    rng = np.random.default_rng(0)
    for split, files, repeats in (("train", 2, per_class), ("test", 1, 1)):
        names = [f"ply_data_{split}{i}.h5" for i in range(files)]
        lines = [f"data/modelnet40_ply_hdf5_2048/{name}" for name in names]
        (folder / f"{split}_files.txt").write_text("\n".join(lines) + "\n")
        labels = rng.permutation(np.repeat(np.arange(40, dtype=np.uint8), repeats))
        for name, part in zip(names, np.array_split(labels, files), strict=True):
            data = rng.uniform(-0.5, 0.5, (len(part), points, 3)).astype(np.float32)
            with h5py.File(folder / name, "w") as file:
                file.create_dataset("data", data=data, compression="gzip", chunks=(8, 16, 1))
                file.create_dataset("label", data=part[:, None], compression="gzip")
    return folder


def write_off(path: Path, joined_header: bool = False, size: float = 1.0) -> Path:
    """A box of 10 x 20 x 30 units, far from the origin as CAD models are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["OFF8 6 0"] if joined_header else ["OFF", "8 6 0"]
    lines += [" ".join(map(str, vertex)) for vertex in BOX * size + 100]
    lines += [" ".join(map(str, (4, *quad))) for quad in QUADS]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_meshes(folder: Path) -> Path:
    for number, name in enumerate(MODELNET10_CLASSES):
        write_off(folder / name / "train" / f"{name}_0001.off", joined_header=number % 2 == 0)
        write_off(folder / name / "train" / f"{name}_0002.off", size=1 + number)
        write_off(folder / name / "test" / f"{name}_0003.off", size=20 + number)
    return folder


def write_txt(folder: Path, points: int = 64) -> Path:
    folder = folder / "modelnet40_normal_resampled"
    folder.mkdir(parents=True)
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(MODELNET40_CLASSES) + "\n")
    rng = np.random.default_rng(0)
    for split, numbers in (("train", (1, 2, 3)), ("test", (4,))):
        names = [f"{name}_{number:04d}" for name in MODELNET40_CLASSES for number in numbers]
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            rows = rng.normal(size=(points, 6))
            rows[:, 3:] /= np.linalg.norm(rows[:, 3:], axis=1, keepdims=True)
            path = folder / name.rpartition("_")[0] / f"{name}.txt"
            path.parent.mkdir(exist_ok=True)
            np.savetxt(path, rows, fmt="%.6f", delimiter=",")
    return folder


class PublicFeatures(nn.Module):
    """The layout of learning3d's feature network: convolutions of size one, (B, C, N)."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        widths = (3, 64, 64, 64, 128, embedding)
        for i in range(1, 6):
            setattr(self, f"conv{i}", nn.Conv1d(widths[i - 1], widths[i], 1))
        for i in range(1, 6):
            setattr(self, f"bn{i}", nn.BatchNorm1d(widths[i]))

    def forward(self, points: Tensor) -> Tensor:
        features = points.mT
        for i in range(1, 6):
            features = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(features)).relu()
        return features.amax(dim=-1)


class PublicClassifier(nn.Module):
    def __init__(self, num_classes: int = 40, embedding: int = 64) -> None:
        super().__init__()
        self.feature_model = PublicFeatures(embedding)
        self.linear1, self.bn1 = nn.Linear(embedding, 512), nn.BatchNorm1d(512)
        self.linear2, self.bn2 = nn.Linear(512, 256), nn.BatchNorm1d(256)
        self.linear3 = nn.Linear(256, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        code = self.bn1(self.linear1(self.feature_model(points))).relu()
        return self.linear3(self.bn2(self.linear2(code)).relu())


def number(
    owner: nn.Module,
    name: str,
    build: Callable[..., nn.Module],
    widths: Sequence[int],
    start: int = 1,
) -> None:
    """``owner.conv1``, ``owner.conv2``, ... between the widths; a normalisation for each width."""
    sizes = pairwise(widths) if build is not nn.BatchNorm1d else ((width,) for width in widths)
    for i, size in enumerate(sizes, start):
        setattr(owner, f"{name}{i}", build(*size))


def convolution(in_channels: int, out_channels: int) -> nn.Conv1d:
    return nn.Conv1d(in_channels, out_channels, 1)


def step(owner: nn.Module, features: Tensor, layer: str, norm: str, relu: bool = True) -> Tensor:
    """A convolution or linear layer and its normalisation, on ``(B, C, N)`` or ``(B, C)``."""
    features = getattr(owner, norm)(getattr(owner, layer)(features))
    return features.relu() if relu else features


class PublicAlignment(nn.Module):
    """The T-net of fxia22 and yanx27."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        number(self, "conv", convolution, (channels, 64, 128, 1024))
        number(self, "fc", nn.Linear, (1024, 512, 256, size * size))
        number(self, "bn", nn.BatchNorm1d, (64, 128, 1024, 512, 256))

    def forward(self, features: Tensor) -> Tensor:
        code = features
        for i in (1, 2, 3):
            code = step(self, code, f"conv{i}", f"bn{i}")
        code = code.amax(dim=-1)
        for i in (1, 2):
            code = step(self, code, f"fc{i}", f"bn{i + 3}")
        matrix = self.fc3(code).unflatten(1, (self.size, self.size)) + torch.eye(self.size)
        moved = matrix.mT @ features[:, : self.size]
        return torch.cat((moved, features[:, self.size :]), dim=1)


class PublicPointNetFeatures(nn.Module):
    """Of fxia22 and yanx27: features of the cloud, and of the points behind the T-nets."""

    def __init__(self, channels: int = 3, second: bool = True) -> None:
        super().__init__()
        self.stn = PublicAlignment(channels, 3)
        number(self, "conv", convolution, (channels, 64, 128, 1024))
        number(self, "bn", nn.BatchNorm1d, (64, 128, 1024))
        if second:
            self.fstn = PublicAlignment(64, 64)

    def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        points = step(self, self.stn(cloud.mT), "conv1", "bn1")
        points = self.fstn(points) if hasattr(self, "fstn") else points
        last = step(self, step(self, points, "conv2", "bn2"), "conv3", "bn3", relu=False)
        return last.amax(dim=-1), points


class PublicPointNet(nn.Module):
    """Of fxia22 and yanx27."""

    def __init__(self, num_classes: int, channels: int = 3, second: bool = True) -> None:
        super().__init__()
        self.feat = PublicPointNetFeatures(channels, second)
        number(self, "fc", nn.Linear, (1024, 512, 256, num_classes))
        number(self, "bn", nn.BatchNorm1d, (512, 256))

    def forward(self, cloud: Tensor) -> Tensor:
        code, _ = self.feat(cloud)
        return self.fc3(step(self, step(self, code, "fc1", "bn1"), "fc2", "bn2"))


class PublicPointNetSegmentation(nn.Module):
    """Of fxia22: no category."""

    def __init__(self, num_parts: int, second: bool = True) -> None:
        super().__init__()
        self.feat = PublicPointNetFeatures(3, second)
        number(self, "conv", convolution, (1024 + 64, 512, 256, 128, num_parts))
        number(self, "bn", nn.BatchNorm1d, (512, 256, 128))

    def forward(self, cloud: Tensor) -> Tensor:
        code, points = self.feat(cloud)
        features = torch.cat((code[..., None].expand(-1, -1, cloud.shape[1]), points), dim=1)
        for i in (1, 2, 3):
            features = step(self, features, f"conv{i}", f"bn{i}")
        return self.conv4(features).mT


class PublicPointNetParts(nn.Module):
    """Of yanx27."""

    def __init__(self, num_parts: int = 50, channels: int = 3) -> None:
        super().__init__()
        widths = (64, 128, 128, 512, 2048)
        self.stn, self.fstn = PublicAlignment(channels, 3), PublicAlignment(128, 128)
        number(self, "conv", convolution, (channels, *widths))
        number(self, "bn", nn.BatchNorm1d, widths)
        number(self, "convs", convolution, (2048 + 16 + sum(widths), 256, 256, 128, num_parts))
        number(self, "bns", nn.BatchNorm1d, (256, 256, 128))

    def forward(self, cloud: Tensor, category: Tensor) -> Tensor:
        levels = [step(self, self.stn(cloud.mT), "conv1", "bn1")]
        for i in (2, 3):
            levels.append(step(self, levels[-1], f"conv{i}", f"bn{i}"))
        levels.append(step(self, self.fstn(levels[-1]), "conv4", "bn4"))
        levels.append(step(self, levels[-1], "conv5", "bn5", relu=False))
        code = torch.cat((levels[-1].amax(dim=-1), category), dim=1)
        features = torch.cat((code[..., None].expand(-1, -1, cloud.shape[1]), *levels), dim=1)
        for i in (1, 2, 3):
            features = step(self, features, f"convs{i}", f"bns{i}")
        return self.convs4(features).mT


def farthest(points: Tensor, count: int) -> Tensor:
    """Farthest-point sampling, begun with the point farthest from the centroid."""
    clouds = torch.arange(len(points))
    chosen = [(points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmax(dim=1)]
    nearest = torch.full(points.shape[:2], torch.inf, dtype=points.dtype)
    for _ in range(count - 1):
        squared = (points - points[clouds, chosen[-1]][:, None]).square().sum(dim=-1)
        nearest = torch.minimum(nearest, squared)
        chosen.append(nearest.argmax(dim=1))
    return torch.stack(chosen, dim=1)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[b, index[b, ...]]``."""
    return values[torch.arange(len(values)).view(-1, *[1] * (index.ndim - 1)), index]


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    squares = queries.square().sum(dim=-1)[..., None] + points.square().sum(dim=-1)[:, None]
    return squares - 2 * queries @ points.mT


def ball(points: Tensor, queries: Tensor, radius: float, count: int) -> Tensor:
    """The first points within the radius, in index order, filled up with the first of them."""
    outside = squared_distances(queries, points) > radius**2
    index = torch.arange(points.shape[1]).expand(outside.shape).masked_fill(outside, len(points[0]))
    index = index.sort(dim=-1).values[..., :count]
    return torch.where(index == points.shape[1], index[..., :1], index)


def stack(widths: Sequence[int], dimensions: int = 2) -> tuple[nn.ModuleList, nn.ModuleList]:
    convolve = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    normalise = (nn.BatchNorm1d, nn.BatchNorm2d)[dimensions - 1]
    convolutions = nn.ModuleList(convolve(*pair, 1) for pair in pairwise(widths))
    return convolutions, nn.ModuleList(normalise(width) for width in widths[1:])


def run(features: Tensor, convolutions: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    for convolve, norm in zip(convolutions, norms, strict=True):
        features = norm(convolve(features)).relu()
    return features


class PublicAbstraction(nn.Module):
    """Of yanx27: scales are ``(radius, count, widths)``; with several, positions come last."""

    def __init__(self, channels: int, centres: int, scales: Sequence[tuple], several: bool) -> None:
        super().__init__()
        self.centres, self.balls, self.several = centres, [scale[:2] for scale in scales], several
        stacks = [stack((3 + channels, *widths)) for *_, widths in scales]
        if several:
            self.conv_blocks = nn.ModuleList(convolutions for convolutions, _ in stacks)
            self.bn_blocks = nn.ModuleList(norms for _, norms in stacks)
        else:
            self.mlp_convs, self.mlp_bns = stacks[0]

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        centres = rows(points, farthest(points, self.centres))
        if self.several:
            stacks = list(zip(self.conv_blocks, self.bn_blocks, strict=True))
        else:
            stacks = [(self.mlp_convs, self.mlp_bns)]
        found = []
        for (radius, count), layers in zip(self.balls, stacks, strict=True):
            index = ball(points, centres, radius, count)
            parts = [rows(points, index) - centres[:, :, None]]
            if features is not None:
                parts.insert(0 if self.several else 1, rows(features, index))
            grouped = torch.cat(parts, dim=-1).permute(0, 3, 2, 1)  # (B, C, members, centres)
            found.append(run(grouped, *layers).amax(dim=2).mT)
        return centres, torch.cat(found, dim=-1)


class PublicPropagation(nn.Module):
    """Of yanx27."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.mlp_convs, self.mlp_bns = stack((channels, *widths), dimensions=1)

    def forward(self, fine: tuple[Tensor, Tensor], coarse: tuple[Tensor, Tensor]) -> Tensor:
        if coarse[1].shape[1] == 1:
            brought = coarse[1].expand(-1, fine[0].shape[1], -1)
        else:
            squared, index = squared_distances(fine[0], coarse[0]).sort(dim=-1)
            weights = 1 / (squared[..., :3] + 1e-8)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            brought = (rows(coarse[1], index[..., :3]) * weights[..., None]).sum(dim=2)
        joined = torch.cat((fine[1], brought), dim=-1)
        return run(joined.mT, self.mlp_convs, self.mlp_bns).mT


SSG = ([(0.2, 32, (64, 64, 128))], [(0.4, 64, (128, 128, 256))])
MSG = (
    [(0.1, 16, (32, 32, 64)), (0.2, 32, (64, 64, 128)), (0.4, 128, (64, 96, 128))],
    [(0.2, 32, (64, 64, 128)), (0.4, 64, (128, 128, 256)), (0.8, 128, (128, 128, 256))],
)
MSG_PARTS = (
    [(0.1, 32, (32, 32, 64)), (0.2, 64, (64, 64, 128)), (0.4, 128, (64, 96, 128))],
    [(0.4, 64, (128, 128, 256)), (0.8, 128, (128, 196, 256))],
)


class PublicPyramid(nn.Module):
    """What the PointNet++ of yanx27 have in common."""

    def abstract(
        self, channels: int, scales: Sequence[Sequence[tuple]], several: bool
    ) -> list[int]:
        """The layers down to the whole cloud, and their widths."""
        widths = [sum(scale[2][-1] for scale in level) for level in scales]
        self.sa1 = PublicAbstraction(channels, 512, scales[0], several)
        self.sa2 = PublicAbstraction(widths[0], 128, scales[1], several)
        self.sa3 = nn.Module()
        self.sa3.mlp_convs, self.sa3.mlp_bns = stack((3 + widths[1], 256, 512, 1024))
        return widths

    def down(self, points: Tensor, features: Tensor | None) -> tuple[list, Tensor]:
        first = self.sa1(points, features)
        second = self.sa2(*first)
        everything = torch.cat(second, dim=-1).mT[..., None]
        whole = run(everything, self.sa3.mlp_convs, self.sa3.mlp_bns).amax(dim=(2, 3))
        return [first, second], whole


class PublicPointNet2(PublicPyramid):
    """Of yanx27, for classification."""

    def __init__(self, num_classes: int, scales: str = "ssg", normals: bool = False) -> None:
        super().__init__()
        self.abstract(3 * normals, SSG if scales == "ssg" else MSG, scales == "msg")
        number(self, "fc", nn.Linear, (1024, 512, 256, num_classes))
        number(self, "bn", nn.BatchNorm1d, (512, 256))

    def forward(self, cloud: Tensor) -> Tensor:
        _, code = self.down(cloud[..., :3], cloud[..., 3:] if cloud.shape[-1] > 3 else None)
        return self.fc3(step(self, step(self, code, "fc1", "bn1"), "fc2", "bn2"))


class PublicPointNet2Parts(PublicPyramid):
    """Of yanx27, for part segmentation."""

    def __init__(self, num_parts: int = 50, scales: str = "ssg", normals: bool = False) -> None:
        super().__init__()
        channels = 6 if normals else 3
        widths = self.abstract(channels, SSG if scales == "ssg" else MSG_PARTS, scales == "msg")
        self.fp3 = PublicPropagation(1024 + widths[1], (256, 256))
        self.fp2 = PublicPropagation(256 + widths[0], (256, 128))
        last = (128, 128, 128) if scales == "ssg" else (128, 128)
        self.fp1 = PublicPropagation(128 + 16 + 3 + channels, last)
        number(self, "conv", convolution, (128, 128, num_parts))
        number(self, "bn", nn.BatchNorm1d, (128,))

    def forward(self, cloud: Tensor, category: Tensor) -> Tensor:
        points = cloud[..., :3]
        (first, second), whole = self.down(points, cloud)
        features = self.fp3(second, (points[:, :1], whole[:, None]))
        features = self.fp2(first, (second[0], features))
        known = (category[:, None].expand(-1, points.shape[1], -1), points, cloud)
        features = self.fp1((points, torch.cat(known, dim=-1)), (first[0], features))
        return self.conv2(step(self, features.mT, "conv1", "bn1")).mT


def edges(features: Tensor, k: int) -> Tensor:
    """``(B, C, N)`` to ``(B, 2C, N, k)``: ``[x_j - x_i, x_i]`` of the k nearest."""
    points = features.mT
    index = squared_distances(points, points).topk(k, largest=False).indices
    centres = points[:, :, None].expand(-1, -1, k, -1)
    return torch.cat((rows(points, index) - centres, centres), dim=-1).permute(0, 3, 1, 2)


def leaky(
    owner: nn.Module, name: str, norm: str, inputs: int, outputs: int, dimensions: int = 1
) -> None:
    """``owner.name``, a sequence of convolution, ``owner.norm`` and leaky ReLU."""
    convolve = (nn.Conv1d, nn.Conv2d)[dimensions - 1](inputs, outputs, 1, bias=False)
    setattr(owner, norm, (nn.BatchNorm1d, nn.BatchNorm2d)[dimensions - 1](outputs))
    setattr(owner, name, nn.Sequential(convolve, getattr(owner, norm), nn.LeakyReLU(0.2)))


class PublicDGCNN(nn.Module):
    """Of WangYueFt and antao97: normalisations are named twice."""

    def __init__(self, num_classes: int = 40, k: int = 20, embedding: int = 1024) -> None:
        super().__init__()
        self.k = k
        for i, pair in enumerate(((6, 64), (128, 64), (128, 128), (256, 256)), 1):
            leaky(self, f"conv{i}", f"bn{i}", *pair, dimensions=2)
        leaky(self, "conv5", "bn5", 512, embedding)
        self.linear1 = nn.Linear(2 * embedding, 512, bias=False)
        number(self, "linear", nn.Linear, (512, 256, num_classes), start=2)
        number(self, "bn", nn.BatchNorm1d, (512, 256), start=6)

    def forward(self, cloud: Tensor) -> Tensor:
        features, levels = cloud.mT, []
        for i in (1, 2, 3, 4):
            features = getattr(self, f"conv{i}")(edges(features, self.k)).amax(dim=-1)
            levels.append(features)
        features = self.conv5(torch.cat(levels, dim=1))
        code = torch.cat((features.amax(dim=-1), features.mean(dim=-1)), dim=1)
        code = F.leaky_relu(self.bn6(self.linear1(code)), 0.2)
        return self.linear3(F.leaky_relu(self.bn7(self.linear2(code)), 0.2))


class PublicEdgeAlignment(nn.Module):
    """The transform net of antao97; one of its normalisations takes the name of another."""

    def __init__(self) -> None:
        super().__init__()
        leaky(self, "conv1", "bn1", 6, 64, dimensions=2)
        leaky(self, "conv2", "bn2", 64, 128, dimensions=2)
        leaky(self, "conv3", "bn3", 128, 1024)
        self.linear1, self.bn3 = nn.Linear(1024, 512, bias=False), nn.BatchNorm1d(512)
        self.linear2, self.bn4 = nn.Linear(512, 256, bias=False), nn.BatchNorm1d(256)
        self.transform = nn.Linear(256, 9)

    def forward(self, neighborhoods: Tensor) -> Tensor:
        code = self.conv3(self.conv2(self.conv1(neighborhoods)).amax(dim=-1)).amax(dim=-1)
        code = F.leaky_relu(self.bn3(self.linear1(code)), 0.2)
        code = F.leaky_relu(self.bn4(self.linear2(code)), 0.2)
        return self.transform(code).unflatten(1, (3, 3))


class PublicDGCNNParts(nn.Module):
    """Of antao97."""

    def __init__(self, num_parts: int = 50, k: int = 40, embedding: int = 1024) -> None:
        super().__init__()
        self.k = k
        self.transform_net = PublicEdgeAlignment()
        for i, inputs in enumerate((6, 64, 128, 64, 128), 1):
            leaky(self, f"conv{i}", f"bn{i}", inputs, 64, dimensions=2)
        sizes = ((192, embedding), (16, 64), (embedding + 64 + 192, 256), (256, 256), (256, 128))
        for i, pair in enumerate(sizes, 6):
            leaky(self, f"conv{i}", f"bn{i}", *pair)
        self.conv11 = nn.Conv1d(128, num_parts, 1, bias=False)

    def forward(self, cloud: Tensor, category: Tensor) -> Tensor:
        aligned = (cloud @ self.transform_net(edges(cloud.mT, self.k))).mT
        first = self.conv2(self.conv1(edges(aligned, self.k))).amax(dim=-1)
        second = self.conv4(self.conv3(edges(first, self.k))).amax(dim=-1)
        third = self.conv5(edges(second, self.k)).amax(dim=-1)
        local = torch.cat((first, second, third), dim=1)
        code = self.conv6(local).amax(dim=-1, keepdim=True)
        code = torch.cat((code, self.conv7(category[..., None])), dim=1)
        joined = torch.cat((code.expand(-1, -1, cloud.shape[1]), local), dim=1)
        return self.conv11(self.conv10(self.conv9(self.conv8(joined)))).mT
