"""Clouds as other libraries hold them, into the library and out of it.

>>> clouds = pc.interop.batch(anything)  # doctest: +SKIP
>>> answer = model.predict(*clouds)  # doctest: +SKIP

:func:`batch` takes NumPy arrays and torch tensors, ``torch_geometric`` ``Data`` and ``Batch``,
``pytorch3d.structures.Pointclouds``, Open3D and trimesh clouds, trimesh meshes, what
:mod:`pointcanon.readers` reads, and lists of these, of any sizes. The functions ``to_…`` and
:func:`unpad` lead back, in the order, dtype and device of the clouds. :class:`Canonicalize` is a
transform of PyG pipelines, and :func:`pose_matrices` turns geometries of Open3D and trimesh where
they are, with their colours, faces and textures.

None of these libraries is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pointcanon.interop.clouds import (
    batch,
    pose_matrices,
    to_numpy,
    to_open3d,
    to_pyg,
    to_pytorch3d,
    to_trimesh,
)
from pointcanon.interop.padding import Clouds, pad, unpad

if TYPE_CHECKING:
    from pointcanon.interop.pyg import Canonicalize as Canonicalize

__all__ = [
    "Canonicalize",
    "Clouds",
    "batch",
    "pad",
    "pose_matrices",
    "to_numpy",
    "to_open3d",
    "to_pyg",
    "to_pytorch3d",
    "to_trimesh",
    "unpad",
]


def __getattr__(name: str) -> Any:
    if name == "Canonicalize":  # its base class needs torch_geometric, which is slow to import
        from pointcanon.interop.pyg import Canonicalize

        return Canonicalize
    raise AttributeError(f"module 'pointcanon.interop' has no attribute {name!r}")
