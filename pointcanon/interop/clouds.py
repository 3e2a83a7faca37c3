"""From the clouds of other libraries to :class:`Clouds`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.interop.padding import Clouds, dense, pad, unpad
from pointcanon.readers import Cloud, Mesh, sample_surface

if TYPE_CHECKING:
    import trimesh
    from torch_geometric.data import Batch

__all__ = [
    "batch",
    "pose_matrices",
    "to_numpy",
    "to_open3d",
    "to_pyg",
    "to_pytorch3d",
    "to_trimesh",
]


def batch(
    clouds: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    samples: int = 2048,
) -> Clouds:
    """Clouds of any library, and of any sizes, as one batch.

    Args:
        clouds: A cloud, several in a list, or a batch in the form of a library:

            - arrays and tensors ``(N, 3)``, or ``(B, N, 3)`` for a batch;
            - torch_geometric ``Data`` and ``Batch``: ``pos``, and ``normal`` where there is one;
            - ``pytorch3d.structures.Pointclouds``, or what has its methods;
            - Open3D ``geometry.PointCloud`` and ``t.geometry.PointCloud``;
            - trimesh ``PointCloud``, and ``Trimesh``, whose surface is sampled;
            - :class:`pointcanon.readers.Cloud`.
        dtype: Converts to it; None keeps that of the clouds. Our networks take float32 unless they
            were converted.
        device: Moves there; None leaves the clouds where they are.
        samples: Points that are drawn on the surface of a mesh.

    Returns:
        Differentiable with respect to tensors that were given. Points are not copied if they need
        not be.

    Raises:
        InputError: On anything else, on clouds that are not ``(N, 3)`` or differ in dtype, and if
            the clouds of a PyG batch are not in order.
    """
    if _made_by(clouds, "torch_geometric"):
        found = _from_pyg(clouds)
    elif hasattr(clouds, "points_padded") and hasattr(clouds, "num_points_per_cloud"):
        found = _from_pytorch3d(clouds)
    elif isinstance(clouds, Tensor | np.ndarray) and clouds.ndim == 3:
        found = Clouds(_tensor(clouds))
    elif isinstance(clouds, Sequence) and not isinstance(clouds, Cloud | str):
        pairs = [_single(cloud, samples) for cloud in clouds]
        # converted one by one, so that clouds of several dtypes can be joined
        found = _joined([_put(pair, dtype, device) for pair in pairs])
    else:
        found = _joined([_single(clouds, samples)])
    return _put(found, dtype, device)


def _put(clouds: Clouds, dtype: torch.dtype | None, device: torch.device | str | None) -> Clouds:
    points, mask, normals = clouds
    return Clouds(
        points.to(device=device, dtype=dtype),
        None if mask is None else mask.to(device=device),
        None if normals is None else normals.to(device=device, dtype=dtype),
    )


def _joined(clouds: list[Clouds]) -> Clouds:
    """Several single clouds ``(N_i, 3)`` as a batch."""
    points, mask = pad([cloud.points for cloud in clouds])
    normals = [cloud.normals for cloud in clouds if cloud.normals is not None]
    return Clouds(points, mask, pad(normals)[0] if len(normals) == len(clouds) else None)


def _single(cloud: Any, samples: int) -> Clouds:
    """One cloud: points and normals ``(N, 3)``, no mask."""
    points: Any
    normals: Any = None
    if isinstance(cloud, Cloud):
        points, normals = cloud
    elif isinstance(cloud, Tensor | np.ndarray):
        points = cloud
    elif _made_by(cloud, "torch_geometric"):
        points, normals = cloud.pos, cloud.get("normal", None)
    elif _made_by(cloud, "open3d"):
        points, normals = _from_open3d(cloud)
    elif _made_by(cloud, "trimesh") and hasattr(cloud, "faces"):
        points, normals = sample_surface(
            Mesh(np.asarray(cloud.vertices, dtype=np.float64), np.asarray(cloud.faces)), samples
        )
    elif _made_by(cloud, "trimesh") and hasattr(cloud, "vertices"):
        points = np.asarray(cloud.vertices)
    else:
        raise InputError(
            f"a {type(cloud).__module__}.{type(cloud).__name__} is no cloud that is known; give an "
            "array (N, 3), or see pointcanon.interop.batch"
        )
    rows = _tensor(points)
    if rows.ndim != 2 or rows.shape[-1] != 3:
        raise InputError(f"a cloud has shape {tuple(rows.shape)}, expected (N, 3)")
    return Clouds(rows, None, None if normals is None else _tensor(normals))


def _made_by(thing: Any, library: str) -> bool:
    """Whether a class of the library is among the bases, without importing it."""
    return any(base.__module__.partition(".")[0] == library for base in type(thing).__mro__)


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    if values is None or values.dtype.kind not in "fiu":
        raise InputError(f"a cloud holds {getattr(values, 'dtype', None)}; give an array of floats")
    native = values.dtype.newbyteorder("=")  # torch knows no other, and no negative strides
    return torch.from_numpy(np.require(values, dtype=native, requirements=["C", "W"]))


# ------------------------------------------------------------------------------ torch_geometric


def _from_pyg(data: Any) -> Clouds:
    index = data.get("batch", None)
    if index is None:
        return _joined([_single(data, 0)])
    if bool((index[1:] < index[:-1]).any()):
        raise InputError("the clouds of this PyG batch are mixed: sort the points by batch first")
    if data.pos is None:
        raise InputError("this PyG batch has no pos")
    count = getattr(data, "num_graphs", None) or int(index.max()) + 1
    sizes = torch.bincount(index, minlength=count)
    points, mask = dense(data.pos, sizes)
    normals = data.get("normal", None)
    return Clouds(points, mask, None if normals is None else dense(normals, sizes)[0])


def to_pyg(clouds: Clouds) -> Batch:
    """A ``torch_geometric`` ``Batch`` with ``pos``, ``batch``, ``ptr``, and ``normal`` if any."""
    from torch_geometric.data import Batch, Data

    normals = None if clouds.normals is None else unpad(clouds.normals, clouds.mask)
    points = unpad(clouds.points, clouds.mask)
    return Batch.from_data_list(
        [
            Data(pos=cloud) if normals is None else Data(pos=cloud, normal=normals[i])
            for i, cloud in enumerate(points)
        ]
    )


# ------------------------------------------------------------------------------------ pytorch3d


def _from_pytorch3d(clouds: Any) -> Clouds:
    points, sizes = clouds.points_padded(), clouds.num_points_per_cloud()
    mask = torch.arange(points.shape[1], device=points.device) < sizes[:, None]
    return Clouds(points, None if bool(mask.all()) else mask, clouds.normals_padded())


def to_pytorch3d(clouds: Clouds) -> Any:
    """``pytorch3d.structures.Pointclouds`` of the real points."""
    from pytorch3d.structures import Pointclouds  # pyright: ignore[reportMissingImports]

    normals = None if clouds.normals is None else unpad(clouds.normals, clouds.mask)
    return Pointclouds(points=unpad(clouds.points, clouds.mask), normals=normals)


# ---------------------------------------------------------------------- Open3D, trimesh, NumPy


def _from_open3d(cloud: Any) -> tuple[Any, Any]:
    if hasattr(cloud, "points"):
        normals = np.asarray(cloud.normals) if cloud.has_normals() else None
        return np.asarray(cloud.points), normals
    if not hasattr(cloud, "point"):
        raise InputError(f"an Open3D {type(cloud).__name__} is no point cloud; sample it first")
    # copies, because the memory goes with the cloud
    rows = {name: value.clone().to_dlpack() for name, value in cloud.point.items()}
    points, normals = rows.get("positions"), rows.get("normals")
    return torch.from_dlpack(points), None if normals is None else torch.from_dlpack(normals)


def to_open3d(clouds: Clouds) -> list[Any]:
    """An ``open3d.t.geometry.PointCloud`` for each cloud, which keeps dtype and device.

    Its ``to_legacy()`` gives an ``open3d.geometry.PointCloud``, in float64 on the CPU.
    """
    import open3d  # pyright: ignore[reportMissingImports]

    def held(rows: Tensor) -> Any:
        shared = open3d.core.Tensor.from_dlpack(torch.to_dlpack(rows.detach().contiguous()))
        return shared.clone()

    geometries = []
    normals = None if clouds.normals is None else unpad(clouds.normals, clouds.mask)
    for i, points in enumerate(unpad(clouds.points, clouds.mask)):
        geometry = open3d.t.geometry.PointCloud(held(points))
        if normals is not None:
            geometry.point["normals"] = held(normals[i])
        geometries.append(geometry)
    return geometries


def to_trimesh(clouds: Clouds) -> list[trimesh.PointCloud]:
    """A ``trimesh.PointCloud`` for each cloud, in float64 and without normals, as those are."""
    import trimesh

    return [trimesh.PointCloud(points) for points in to_numpy(clouds)]


def to_numpy(clouds: Clouds) -> list[np.ndarray]:
    """The real points ``(N_i, 3)`` of each cloud, in their dtype."""
    return [points.detach().cpu().numpy() for points in unpad(clouds.points, clouds.mask)]


def pose_matrices(frames: Frames) -> Tensor:
    """Homogeneous matrices ``(B, 4, 4)`` that take each cloud to its canonical pose.

    They act on columns, as graphics libraries have it: ``cloud.transform(matrix)`` in Open3D,
    ``mesh.apply_transform(matrix)`` in trimesh. Where there are several frames, the heaviest
    counts.
    """
    inverse = frames.best().rotations[:, 0].mT
    shift = -(inverse @ frames.centre[..., None].to(inverse.dtype))
    last = inverse.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(inverse), 1, 4)
    return torch.cat((torch.cat((inverse, shift), dim=2), last), dim=1)
