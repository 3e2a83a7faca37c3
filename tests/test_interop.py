"""Clouds of other libraries come in and go out unchanged, in any sizes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import Compose, NormalizeScale

import pointcanon as pc
from pointcanon.interop import Clouds
from pointcanon.rotations import random_rotations

SIZES = (40, 64, 25)


@pytest.fixture
def clouds(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(size, 3, generator=generator) * torch.tensor([3.0, 2, 1]) for size in SIZES]


@pytest.fixture
def normals(clouds: list[Tensor]) -> list[Tensor]:
    return [torch.nn.functional.normalize(cloud, dim=1) for cloud in clouds]


@pytest.fixture
def model() -> pc.Canonicalized:
    torch.manual_seed(0)
    predictor = pc.predictors.create("pointnet", num_classes=3, embedding=16)
    return pc.Canonicalized(predictor, pc.canonicalizers.PCA(4)).eval()


def pyg(**values: Any) -> Any:
    """A Data, whose attributes type checkers cannot know."""
    return Data(**values)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.device == their.device
        assert torch.equal(our, their)


def test_the_answer_does_not_depend_on_the_neighbours(
    clouds: list[Tensor], model: pc.Canonicalized
) -> None:
    together = model.predict(*pc.interop.batch(clouds))
    for i, cloud in enumerate(clouds):
        alone = model.predict(*pc.interop.batch(cloud))
        for ours, theirs in zip(together, alone, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours[i : i + 1], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_padding_and_back(dtype: torch.dtype, clouds: list[Tensor]) -> None:
    given = [(10 * cloud).to(dtype) for cloud in clouds]
    padded, mask = pc.interop.pad(given)
    assert padded.shape == (3, 64, 3)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == list(SIZES)
    assert not padded[~mask].any()
    same(pc.interop.unpad(padded, mask), given)
    labels = [cloud[:, 0] for cloud in given]
    same(pc.interop.unpad(*pc.interop.pad(labels)), labels)
    alike, no_mask = pc.interop.pad(given[:1] * 2)
    assert no_mask is None
    same(pc.interop.unpad(alike, None), given[:1] * 2)


def test_gradients_pass_through_the_padding(clouds: list[Tensor]) -> None:
    leaf = clouds[0].requires_grad_()
    (2 * pc.interop.batch([leaf, clouds[1]]).points).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy(dtype: type, clouds: list[Tensor]) -> None:
    arrays = [cloud.numpy().astype(dtype) for cloud in clouds]
    found = pc.interop.batch(arrays)
    assert found.points.dtype == getattr(torch, np.dtype(dtype).name)
    for ours, theirs in zip(pc.interop.to_numpy(found), arrays, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)
    strange = arrays[0][::-1].astype(np.dtype(dtype).newbyteorder(">"))
    strange.flags.writeable = False
    np.testing.assert_array_equal(pc.interop.batch(strange).points[0], arrays[0][::-1])
    block = np.stack((arrays[0], arrays[0]))
    assert pc.interop.batch(block).points.shape == (2, 40, 3)
    assert pc.interop.batch(arrays, dtype=torch.float16).points.dtype == torch.float16
    mixed = [arrays[0].astype(np.float32), arrays[1].astype(np.float64)]
    assert pc.interop.batch(mixed, dtype=torch.float32).mask is not None


def test_torch_geometric_round_trip(clouds: list[Tensor], normals: list[Tensor]) -> None:
    data = [pyg(pos=p, normal=n) for p, n in zip(clouds, normals, strict=True)]
    for given in (Batch.from_data_list(data), data):
        found = pc.interop.batch(given)
        assert found.points.shape == (3, 64, 3)
        same(pc.interop.unpad(found.points, found.mask), clouds)
        assert found.normals is not None
        same(pc.interop.unpad(found.normals, found.mask), normals)
        back: Any = pc.interop.to_pyg(found)
        same(
            [back.pos, back.normal, back.batch, back.ptr],
            [
                torch.cat(clouds),
                torch.cat(normals),
                torch.arange(3).repeat_interleave(torch.tensor(SIZES)),
                torch.tensor([0, *np.cumsum(SIZES)]),
            ],
        )
    plain = pyg(pos=torch.cat(clouds), batch=back.batch)  # a batch vector without a Batch
    same(pc.interop.unpad(*pc.interop.batch(plain)[:2]), clouds)
    with pytest.raises(pc.InputError, match="sort the points by batch"):
        pc.interop.batch(pyg(pos=torch.cat(clouds), batch=back.batch.flip(0)))


def test_an_empty_cloud_of_a_batch_is_not_lost(
    clouds: list[Tensor], model: pc.Canonicalized
) -> None:
    given = Batch.from_data_list([pyg(pos=clouds[0]), pyg(pos=torch.empty(0, 3))])
    found = pc.interop.batch(given)
    assert found.points.shape == (2, 40, 3)
    with pytest.raises(pc.InputError, match="cloud 1 of the batch is empty"):
        model(*found)


def test_the_transform_makes_a_pipeline_invariant(
    clouds: list[Tensor], normals: list[Tensor], generator: torch.Generator
) -> None:
    canonicalizer = pc.canonicalizers.PCA(1)
    turns = random_rotations(3, generator=generator)
    data = [pyg(pos=p, normal=n) for p, n in zip(clouds, normals, strict=True)]
    turned = [
        pyg(pos=d.pos @ turn.mT + 5, normal=d.normal @ turn.mT)
        for d, turn in zip(data, turns, strict=True)
    ]
    transform = pc.interop.Canonicalize(canonicalizer)
    assert repr(transform) == "Canonicalize(PCA)"
    pipeline = Compose([transform, NormalizeScale()])
    for one, other in zip(data, turned, strict=True):
        torch.testing.assert_close(pipeline(one).pos, pipeline(other).pos, atol=1e-4, rtol=0)
    (batch,) = DataLoader([transform(d) for d in turned], batch_size=3)
    whole = transform(Batch.from_data_list(turned))
    for key in ("pos", "normal", "rotation", "centre"):
        torch.testing.assert_close(batch[key], whole[key], atol=1e-4, rtol=0)
    assert batch.rotation.shape == (3, 3, 3)
    back = torch.einsum("nij,nj->ni", batch.rotation[batch.batch], batch.pos)
    given = torch.cat([d.pos for d in turned])
    torch.testing.assert_close(back + batch.centre[batch.batch], given, atol=1e-4, rtol=0)
    assert torch.equal(turned[0].pos, clouds[0] @ turns[0].mT + 5)  # the data stay as they were


def test_a_loader_of_ragged_clouds_goes_through_a_model(
    clouds: list[Tensor], model: pc.Canonicalized
) -> None:
    loader = DataLoader([pyg(pos=cloud) for cloud in clouds], batch_size=2)
    labels = torch.cat([model.predict(*pc.interop.batch(batch)).labels for batch in loader])
    assert torch.equal(labels, model.predict(*pc.interop.batch(clouds)).labels)


def test_the_transform_takes_a_model_and_leaves_its_mode_alone(model: pc.Canonicalized) -> None:
    model.train()
    transform = pc.interop.Canonicalize(model)
    assert model.canonicalizer.training
    assert transform.canonicalizer is not model.canonicalizer
    assert not transform.canonicalizer.training


class Pointclouds:
    """The part of pytorch3d.structures.Pointclouds that its documentation promises."""

    def __init__(self, points: list[Tensor], normals: list[Tensor] | None = None) -> None:
        self._points, self._normals = points, normals

    def points_list(self) -> list[Tensor]:
        return self._points

    def normals_list(self) -> list[Tensor] | None:
        return self._normals

    def points_padded(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(self._points, batch_first=True)

    def normals_padded(self) -> Tensor | None:
        if self._normals is None:
            return None
        return torch.nn.utils.rnn.pad_sequence(self._normals, batch_first=True)

    def num_points_per_cloud(self) -> Tensor:
        return torch.tensor([len(points) for points in self._points])


@pytest.mark.parametrize("with_normals", [False, True])
def test_pytorch3d_round_trip(
    with_normals: bool,
    clouds: list[Tensor],
    normals: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    structures = ModuleType("pytorch3d.structures")
    structures.Pointclouds = Pointclouds  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch3d", ModuleType("pytorch3d"))
    monkeypatch.setitem(sys.modules, "pytorch3d.structures", structures)
    found = pc.interop.batch(Pointclouds(clouds, normals if with_normals else None))
    assert (found.normals is not None) == with_normals
    back = pc.interop.to_pytorch3d(found)
    assert isinstance(back, Pointclouds)
    same(back.points_list(), clouds)
    if with_normals:
        same(back.normals_list() or [], normals)
    assert pc.interop.batch(Pointclouds(clouds[:1])).mask is None


def test_the_real_pytorch3d(clouds: list[Tensor], normals: list[Tensor]) -> None:
    structures = pytest.importorskip("pytorch3d.structures")
    back = pc.interop.to_pytorch3d(pc.interop.batch(structures.Pointclouds(clouds, normals)))
    same(back.points_list(), clouds)
    same(back.normals_list(), normals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_real_open3d(dtype: torch.dtype, clouds: list[Tensor], normals: list[Tensor]) -> None:
    open3d = pytest.importorskip("open3d")
    given = pc.interop.batch(
        [pc.readers.Cloud(p.numpy(), n.numpy()) for p, n in zip(clouds, normals, strict=True)],
        dtype=dtype,
    )
    geometries = pc.interop.to_open3d(given)
    legacy = [geometry.to_legacy() for geometry in geometries]
    assert isinstance(legacy[0], open3d.geometry.PointCloud)
    for held, kept in ((geometries, dtype), (legacy, torch.float64)):
        found = pc.interop.batch(held)
        expected = [cloud.to(kept) for cloud in clouds]
        same(pc.interop.unpad(found.points, found.mask), expected)
        assert found.normals is not None
        directions = pc.interop.unpad(found.normals, found.mask)
        torch.testing.assert_close(torch.cat(directions), torch.cat(normals).to(kept))
    frames = pc.canonicalizers.PCA(4)(given.points, given.mask).best()
    posed = pc.interop.unpad(frames.apply(given.points)[:, 0], given.mask)
    for cloud, matrix, ours in zip(legacy, pc.interop.pose_matrices(frames), posed, strict=True):
        cloud.transform(matrix.double().numpy())
        np.testing.assert_allclose(np.asarray(cloud.points), ours, atol=1e-4)


def test_trimesh_clouds_and_meshes(clouds: list[Tensor]) -> None:
    given = [trimesh.PointCloud(cloud.double().numpy()) for cloud in clouds]
    found = pc.interop.batch(given)
    same(pc.interop.unpad(found.points, found.mask), [cloud.double() for cloud in clouds])
    for ours, theirs in zip(pc.interop.to_trimesh(found), given, strict=True):
        np.testing.assert_array_equal(ours.vertices, theirs.vertices)
    mesh = trimesh.creation.box((1.0, 2.0, 3.0))
    sampled = pc.interop.batch([mesh, given[0]], samples=500)
    assert sampled.points.shape == (2, 500, 3)
    assert sampled.normals is None  # not every cloud has them
    alone = pc.interop.batch(mesh, samples=500)
    assert alone.normals is not None
    np.testing.assert_allclose(alone.normals[0].norm(dim=1), 1)


def test_a_matrix_turns_a_mesh_into_canonical_pose() -> None:
    mesh = trimesh.creation.box((1.0, 2.0, 3.0))
    mesh.apply_transform(trimesh.transformations.rotation_matrix(0.7, (1, 2, 3)))
    mesh.apply_translation((4, 5, 6))
    cloud = pc.interop.batch(np.asarray(mesh.vertices))
    frames = pc.canonicalizers.PCA(1)(*cloud)
    (matrix,) = pc.interop.pose_matrices(frames)
    mesh.apply_transform(matrix.numpy())
    np.testing.assert_allclose(mesh.vertices, frames.apply(cloud.points)[0, 0], atol=1e-12)
    np.testing.assert_allclose(mesh.centroid, 0, atol=1e-12)
    assert mesh.is_watertight


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "there are no clouds"),
        ("cloud.ply", "builtins.str is no cloud"),
        ([torch.zeros(3, 4)], r"shape \(3, 4\), expected \(N, 3\)"),
        ([torch.zeros(4, 3), torch.zeros(4, 3).double()], "cloud 1 is torch.float64"),
        (np.array([None]), "holds object"),
        (pyg(x=torch.zeros(4, 3)), "holds None"),
        (Batch.from_data_list([pyg(x=torch.zeros(4, 3))]), "has no pos"),
        ({"points": 3}, "builtins.dict is no cloud"),
    ],
)
def test_what_is_no_cloud_is_refused(given: object, words: str) -> None:
    with pytest.raises(pc.InputError, match=words):
        pc.interop.batch(given)


def test_what_is_read_is_a_cloud(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.eye(3))
    found = pc.interop.batch([pc.readers.read(tmp_path / "a.npy")])
    assert isinstance(found, Clouds)
    assert torch.equal(found.points[0], torch.eye(3, dtype=torch.float64))
