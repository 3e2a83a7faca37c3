"""What others publish, made small: the three layouts of ModelNet, and learning3d's PointNet."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from torch import Tensor, nn

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
    def __init__(self, num_classes: int, embedding: int) -> None:
        super().__init__()
        self.feature_model = PublicFeatures(embedding)
        self.linear1, self.bn1 = nn.Linear(embedding, 512), nn.BatchNorm1d(512)
        self.linear2, self.bn2 = nn.Linear(512, 256), nn.BatchNorm1d(256)
        self.linear3 = nn.Linear(256, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        code = self.bn1(self.linear1(self.feature_model(points))).relu()
        return self.linear3(self.bn2(self.linear2(code)).relu())
