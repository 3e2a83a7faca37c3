"""Files of every format as other programs write them, and what is said of those that are bad."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import trimesh

from pointcanon import readers
from pointcanon.datasets.modelnet_layouts import OffLayout
from pointcanon.errors import DataError, InputError
from pointcanon.readers.pcd import decompress_lzf
from pointcanon.rotations import random_rotations

POINTS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [1.5, -2.5, 1e-3]], dtype=np.float32)
NORMALS = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]


def ply(encoding: str, normals: bool = True) -> bytes:
    """As a scanner writes it: colours between positions and normals."""
    order = ">" if "big" in encoding else "<"
    fields = [(name, f"{order}f4") for name in "xyz"] + [("red", "u1"), ("label", f"{order}i4")]
    fields += [(name, f"{order}f4") for name in ("nx", "ny", "nz")] if normals else []
    rows = np.zeros(len(POINTS), dtype=fields)
    for i, name in enumerate("xyz"):
        rows[name] = POINTS[:, i]
        if normals:
            rows[f"n{name}"] = NORMALS[:, i]
    rows["red"], rows["label"] = 200, -7
    kinds = {"f4": "float", "u1": "uchar", "i4": "int"}
    lines = ["ply", f"format {encoding} 1.0", "comment made by hand", f"element vertex {len(rows)}"]
    lines += [f"property {kinds[str(kind)[-2:]]} {name}" for name, kind in fields]
    header = "\n".join([*lines, "end_header\n"]).encode()
    if encoding == "ascii":
        return header + "\n".join(" ".join(map(str, row)) for row in rows.tolist()).encode()
    return header + rows.tobytes()


def pcd(data: str, points: np.ndarray = POINTS, count: int | None = None) -> bytes:
    """As PCL writes it, with a padding field that is named ``_``."""
    fields = "x y z _ normal_x normal_y normal_z"
    count = len(points) if count is None else count
    header = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE 4 4 4 1 4 4 4\nTYPE F F F U F F F\n"
        f"COUNT 1 1 1 4 1 1 1\nWIDTH {count}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {count}\nDATA {data}\n"
    ).encode()
    normals = NORMALS[: len(points)]
    if data == "ascii":
        both = zip(points.tolist(), normals.tolist(), strict=True)
        rows = [[*point, 0, 0, 0, 0, *normal] for point, normal in both]
        return header + "\n".join(" ".join(map(str, row)) for row in rows).encode() + b"\n"
    columns = [*points.T.copy(), np.zeros((len(points), 4), "u1"), *normals.T.copy()]
    if data == "binary":
        bytes_of = [column.view("u1").reshape(len(points), -1) for column in columns]
        return header + np.hstack(bytes_of).tobytes()
    whole = b"".join(column.tobytes() for column in columns)
    packed = compress_lzf(whole)
    return header + struct.pack("<II", len(packed), len(whole)) + packed


def compress_lzf(data: bytes) -> bytes:
    """A plain LZF compressor: greedy, matches of three bytes and more."""
    out, literal, seen, at = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literal), 32):
            run = literal[start : start + 32]
            out.extend((len(run) - 1, *run))
        literal.clear()

    while at < len(data):
        key = data[at : at + 3]
        start = seen.get(key, -1)
        seen[key] = at
        if len(key) < 3 or start < 0 or at - start > 8192:
            literal.append(data[at])
            at += 1
            continue
        length = 3
        most = min(264, len(data) - at)
        while length < most and data[start + length] == data[at + length]:
            length += 1
        flush()
        offset, coded = at - start - 1, length - 2
        if coded < 7:
            out.extend((coded << 5 | offset >> 8, offset & 255))
        else:
            out.extend((7 << 5 | offset >> 8, coded - 7, offset & 255))
        at += length
    flush()
    return bytes(out)


def npy(array: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.save(packed, array)
    return packed.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    return packed.getvalue()


def h5(**arrays: np.ndarray) -> bytes:
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return packed.getvalue()


def text(separator: str, header: str = "", normals: bool = True) -> bytes:
    rows = np.hstack((POINTS, NORMALS)) if normals else POINTS
    lines = (separator.join(map(repr, row)) for row in rows.astype(float).tolist())
    return (header + "\n".join(lines) + "\n").encode()


BOTH = np.hstack((POINTS, NORMALS))
CLOUDS: dict[str, tuple[str, bytes, bool]] = {
    "ply ascii": (".ply", ply("ascii"), True),
    "ply little": (".ply", ply("binary_little_endian"), True),
    "ply big": (".PLY", ply("binary_big_endian"), True),
    "ply without normals": (".ply", ply("ascii", normals=False), False),
    "off": (".off", b"OFF\n5 0 0\n" + text(" ", normals=False), False),
    "obj": (
        ".obj",
        b"# points\n" + b"".join(b"v %r %r %r\n" % tuple(p) for p in POINTS.tolist()),
        False,
    ),
    "pcd ascii": (".pcd", pcd("ascii"), True),
    "pcd binary": (".pcd", pcd("binary"), True),
    "pcd compressed": (".pcd", pcd("binary_compressed"), True),
    "xyz": (".xyz", text(" ", normals=False), False),
    "txt": (".txt", text("\t", "# x y z and normals\n\n"), True),
    "csv": (".csv", text(","), True),
    "csv with names": (
        ".csv",
        b"id;Z;y;x\n" + b"".join(b"9;%r;%r;%r\n" % (z, y, x) for x, y, z in POINTS.tolist()),
        False,
    ),
    "npy": (".npy", npy(POINTS), False),
    "npy of six columns": (".npy", npy(BOTH), True),
    "npy in Fortran's order": (".npy", npy(np.asfortranarray(BOTH)), True),
    "npy big endian": (".npy", npy(BOTH.astype(">f8")), True),
    "npz": (".npz", npz(points=POINTS, normals=NORMALS, label=np.array(3)), True),
    "npz of one array": (".npz", npz(scan=POINTS), False),
    "h5": (".h5", h5(data=POINTS, normal=NORMALS), True),
}


@pytest.mark.parametrize("kind", CLOUDS)
def test_clouds_come_as_they_are(kind: str, tmp_path: Path) -> None:
    suffix, content, normals = CLOUDS[kind]
    path = tmp_path / f"cloud{suffix}"
    path.write_bytes(content)
    cloud = readers.read(path)
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.points.dtype in (np.float32, np.float64)
    assert (cloud.normals is not None) == normals
    if cloud.normals is not None:
        np.testing.assert_array_equal(cloud.normals, NORMALS)
    assert not readers.CloudFile(path).stacked


@pytest.mark.parametrize("suffix", [".ply", ".ascii.ply", ".off", ".obj", ".stl", ".ascii.stl"])
def test_meshes_are_sampled_on_their_surface(suffix: str, tmp_path: Path) -> None:
    mesh = trimesh.creation.box((2.0, 4.0, 6.0))
    path = tmp_path / f"box{suffix}"
    kind = {".ascii.stl": "stl_ascii"}.get(suffix, path.suffix[1:])
    options = {"encoding": "ascii"} if suffix == ".ascii.ply" else {}
    written: Any = mesh.export(file_type=kind, **options)
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    cloud = readers.read(path, samples=6000)
    assert cloud.points.shape == (6000, 3)
    assert cloud.normals is not None
    # on a face, whose normal is the axis, in proportion to its area
    axis = np.abs(cloud.normals).argmax(axis=1)
    at = np.arange(6000), axis
    np.testing.assert_allclose(cloud.normals[at], np.sign(cloud.points[at]), atol=1e-6)
    np.testing.assert_allclose(np.abs(cloud.points[at]), np.array([1.0, 2.0, 3.0])[axis], atol=1e-6)
    np.testing.assert_allclose(np.bincount(axis) / 6000, np.array([24, 12, 8]) / 44, atol=0.02)
    assert np.array_equal(cloud.points, readers.read(path, samples=6000).points)


def test_a_turned_mesh_is_sampled_at_the_same_places(generator: torch.Generator) -> None:
    mesh = trimesh.creation.icosphere(2)
    rotation = random_rotations(generator=generator, dtype=torch.float64).numpy()
    still = readers.sample_surface(readers.Mesh(mesh.vertices, mesh.faces), 100)
    moved = readers.Mesh(1e-200 * mesh.vertices @ rotation.T, mesh.faces)
    turned = readers.sample_surface(moved, 100)
    np.testing.assert_allclose(turned.points * 1e200, still.points @ rotation.T, atol=1e-12)


def test_polygons_of_any_size_become_triangles(tmp_path: Path) -> None:
    """A pyramid on a square, in the mixture of lists that exporters write."""
    corners = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 0.5, 1)]
    faces = [(0, 3, 2, 1), (0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)]
    header = (
        "ply\nformat {} 1.0\nelement vertex 5\nproperty float x\nproperty float y\n"
        "property float z\nelement face 5\nproperty uchar flag\n"
        "property list uchar int vertex_indices\nelement edge 1\nproperty int a\nend_header\n"
    )
    vertices = "".join("{} {} {}\n".format(*corner) for corner in corners)
    rows = "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in faces)
    (tmp_path / "a.off").write_text(f"OFF5 5 0\n{vertices}{rows}")
    flagged = "".join(f"1 {row}\n" for row in rows.splitlines())
    (tmp_path / "a.ply").write_text(header.format("ascii") + vertices + flagged + "7\n")
    packed = np.array(corners, ">f4").tobytes()
    for face in faces:
        packed += struct.pack(f">BB{len(face)}i", 1, len(face), *face)
    binary = header.format("binary_big_endian").encode() + packed + struct.pack(">i", 7)
    (tmp_path / "b.ply").write_bytes(binary)
    objects = "".join(f"f {' '.join(str(corner + 1) for corner in face)}\n" for face in faces)
    (tmp_path / "a.obj").write_text(
        "mtllib ../../../etc/passwd\no one\n"
        + "".join("v {} {} {}\n".format(*corner) for corner in corners)
        + objects
    )
    clouds = [readers.read(path, samples=4000) for path in sorted(tmp_path.iterdir())]
    assert len(clouds) == 4
    for cloud in clouds:
        assert cloud.normals is not None
        below = cloud.points[:, 2] == 0
        assert below.mean() == pytest.approx(1 / (1 + 5**0.5), abs=0.03)
        np.testing.assert_allclose(cloud.normals[below], [[0, 0, -1]] * below.sum(), atol=1e-7)


def test_points_a_sensor_missed_are_left_out_of_pcd(tmp_path: Path) -> None:
    points = POINTS.copy()
    points[2] = np.nan
    for data in ("ascii", "binary", "binary_compressed"):
        path = tmp_path / f"{data}.pcd"
        path.write_bytes(pcd(data, points))
        cloud = readers.read(path)
        np.testing.assert_array_equal(cloud.points, np.delete(POINTS, 2, axis=0))
        assert cloud.normals is not None
        np.testing.assert_array_equal(cloud.normals, np.delete(NORMALS, 2, axis=0))


def test_lzf_repeats_that_reach_into_themselves() -> None:
    # "ab", then 20 bytes from two back (2 + 7 + 11), as LibLZF codes it
    assert decompress_lzf(bytes([1, 97, 98, 7 << 5, 11, 1]), 22) == b"ab" * 11
    assert decompress_lzf(bytes([0, 0, 7 << 5, 90, 0]), 100) == bytes(100)
    data = bytes(np.random.default_rng(0).integers(0, 3, 5000, dtype=np.uint8)) + bytes(3000)
    packed = compress_lzf(data)
    assert len(packed) < len(data) / 2
    assert decompress_lzf(packed, len(data)) == data
    for damaged, size in ((packed[:-1], len(data)), (packed, len(data) - 1), (b"\x20\x05", 3)):
        with pytest.raises(ValueError, match="compressed data"):
            decompress_lzf(damaged, size)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_a_file_of_many_clouds_is_read_one_by_one(suffix: str, tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    clouds[3, 2] = np.nan
    normals = np.broadcast_to(NORMALS, clouds.shape)
    write: dict[str, Callable[[], bytes]] = {
        ".npy": lambda: npy(np.concatenate((clouds, normals), axis=2)),
        ".npz": lambda: npz(points=clouds, normals=normals),
        ".h5": lambda: h5(data=clouds, normal=normals, label=np.zeros((7, 1))),
    }
    path = tmp_path / f"many{suffix}"
    path.write_bytes(write[suffix]())
    held = readers.CloudFile(path)
    assert held.stacked
    assert len(held) == 7
    for index in (6, 0, 5):
        np.testing.assert_array_equal(held[index].points, clouds[index])
        np.testing.assert_array_equal(held[index].normals, NORMALS)
    with pytest.raises(DataError, match=rf"many{suffix}\[3\] cannot be read: point 2 is \[nan"):
        held[3]
    with pytest.raises(DataError, match="holds 7 clouds"):
        readers.read(path)
    with pytest.raises(IndexError):
        held[7]


def test_colours_are_not_taken_for_normals(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [1, 0, 0], [0.2, 0.3, 0.4], [0, 0, 0]])
    np.savetxt(tmp_path / "a.xyz", np.hstack((POINTS, colours)))
    assert readers.read(tmp_path / "a.xyz").normals is None


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path("/tmp/pointcanon-was-here").touch, ())


def huge_npy() -> bytes:
    packed = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        packed, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 3)}
    )
    return packed.getvalue() + bytes(100)


def huge_h5() -> bytes:
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file.create_dataset("data", (1, 1 << 40, 3), dtype="f4", chunks=(1, 1024, 3))
    return packed.getvalue()


GIANT = b"element vertex 999999999999"
BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": (".ply", b"", "it is empty"),
    "no ply": (".ply", b"solid x", "does not begin with a PLY header"),
    "ply without end": (".ply", ply("ascii")[:90], "cut off in it"),
    "ply ascii cut off": (".ply", ply("ascii")[:-60], "cut off|numbers"),
    "ply binary cut off": (".ply", ply("binary_little_endian")[:-1], "cut off: 5 rows of vertex"),
    "ply giant": (".ply", ply("binary_big_endian").replace(b"element vertex 5", GIANT), "cut off"),
    "ply giant ascii": (".ply", ply("ascii").replace(b"element vertex 5", GIANT), "cut off"),
    "ply negative": (".ply", ply("ascii").replace(b"vertex 5", b"vertex -5"), "announces -5"),
    "ply of doubles?": (".ply", ply("ascii").replace(b"float x", b"quad x"), "line 'property quad"),
    "off cut off": (".off", b"OFF\n8 6 0\n0 0 0\n", "8 vertices and 6 faces are announced, 1"),
    "off without header": (".off", b"8 6 0\n", "not OFF and counts"),
    "off face outside": (".off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "outside 0 … 2"),
    "off flat": (".off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "no area"),
    "obj without vertices": (".obj", b"f 1 2 3\n", "no vertices"),
    "obj face outside": (".obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "."),
    "obj nan": (".obj", b"v 0 0 0\nv 1 0 nan\nv 0 1 0\nf 1 2 3\n", "."),
    "stl cut off": (".stl", bytes(80) + struct.pack("<I", 9) + bytes(99), "9 facets are announced"),
    "stl giant": (".stl", bytes(80) + b"\xff" * 4, "4,294,967,295 facets"),
    "stl ascii cut off": (".stl", b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0", "cut off"),
    "pcd no header": (".pcd", b"0 0 0\n" * 9, "no line DATA"),
    "pcd giant": (".pcd", pcd("binary", count=1 << 40), "cut off: 1,099,511,627,776 points"),
    "pcd giant compressed": (".pcd", pcd("binary_compressed", count=1 << 40), "announces"),
    "pcd giant ascii": (".pcd", pcd("ascii", count=1 << 40), "cut off"),
    "pcd cut off": (".pcd", pcd("binary")[:-1], "cut off"),
    "pcd compressed cut off": (".pcd", pcd("binary_compressed")[:-1], "cut off"),
    "pcd without x": (".pcd", pcd("ascii").replace(b"FIELDS x", b"FIELDS u"), "no x, y and z"),
    "pcd of nothing seen": (".pcd", pcd("binary", POINTS * np.float32(np.nan)), "no points"),
    "txt of words": (".txt", b"1 2 3\nsome words here\n", "row 2 reads 'some words here'"),
    "txt uneven": (".txt", b"1 2 3\n1 2 3 4\n", "row 2 has 4 numbers, the rows before it 3"),
    "txt of two columns": (".txt", b"1 2\n3 4\n", r"shape \(2, 2\)"),
    "txt of comments": (".txt", b"# nothing\n", "no points"),
    "txt nan": (".csv", b"1,2,3\n4,nan,6\nnan,1,1\n", "point 1 is .*nan.*, and 1 more"),
    "txt binary": (".txt", b"\0\1\2", "binary"),
    "csv of names": (".csv", b"x,y,z\n", "no points"),
    "npy pickled": (".npy", npy(np.array([None])), "pickled objects"),
    "npy a bare pickle": (".npy", pickle.dumps(Bomb()), "magic"),
    "npy giant": (".npy", huge_npy(), "cut off: an array"),
    "npy cut off": (".npy", npy(POINTS)[:-1], "cut off"),
    "npy of words": (".npy", npy(np.array(["a", "b"])), "not numbers"),
    "npy channels first": (".npy", npy(np.zeros((2, 3, 64))), r"looks like \(n, 3, N\)"),
    "npy one channels first": (".npy", npy(np.zeros((3, 64))), r"looks like \(3, N\)"),
    "npy flat": (".npy", npy(np.zeros(9)), "is no cloud"),
    "npy no clouds": (".npy", npy(np.zeros((0, 9, 3))), "no clouds"),
    "npz pickled": (".npz", npz(points=np.array([None])), "pickled objects"),
    "npz of others": (".npz", npz(weights=POINTS, bias=POINTS), "holds 'weights', 'bias'"),
    "npz no zip": (".npz", b"PK nothing", "zip"),
    "npz mismatch": (".npz", npz(points=POINTS, normals=NORMALS[1:]), "normals have shape"),
    "h5 cut off": (".h5", h5(data=POINTS)[:-100], "truncated|cannot be read"),
    "h5 giant": (".h5", huge_h5(), "bytes, 0 are there"),
    "h5 of others": (".h5", h5(a=POINTS, b=POINTS), "holds 'a', 'b'"),
    "h5 of words": (".h5", h5(data=np.array([b"a", b"b"])), "not numbers"),
    "unknown": (".blend", b"BLENDER", r"unknown kind of file '\.blend'; known: \.ply"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_error_that_names_it(case: str, tmp_path: Path) -> None:
    suffix, content, words = BAD[case]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        readers.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("/tmp/pointcanon-was-here").exists()


@pytest.mark.parametrize(
    "kind", ["ply ascii", "ply little", "pcd binary", "pcd compressed", "csv", "npy", "npz", "h5"]
)
def test_no_damage_gets_through_as_another_error(kind: str, tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte changed: a cloud or a DataError, nothing else."""
    suffix, content, _ = CLOUDS[kind]
    path = tmp_path / f"cloud{suffix}"
    draw = np.random.default_rng(0)
    for step in range(40):
        damaged = bytearray(content)
        if step % 2:
            damaged = damaged[: draw.integers(len(damaged))]
        else:
            damaged[draw.integers(min(len(damaged), 300))] = draw.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert np.isfinite(readers.read(path).points).all()
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_links_out_of_an_h5_file_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other.h5").write_bytes(h5(data=POINTS))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = h5py.ExternalLink("other.h5", "data")
    with pytest.raises(DataError, match=r"a\.h5 cannot be read: it holds no array"):
        readers.read(tmp_path / "a.h5")
    layout = h5py.VirtualLayout((5, 3), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "data", (5, 3))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
    with pytest.raises(DataError, match="lies in other files"):
        readers.read(tmp_path / "b.h5")


def test_folders_are_searched_in_order_and_each_file_comes_once(tmp_path: Path) -> None:
    names = ("b/z.ply", "b/a.OFF", "a.xyz", ".hidden.ply", ".git/x.ply", "b/readme.md", "c/1.h5")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = [tmp_path / "b" / "z.ply", tmp_path, tmp_path / "missing.weird"]
    found = [str(Path(path).relative_to(tmp_path)) for path in readers.find(named)]
    assert found == ["b/z.ply", "a.xyz", "b/a.OFF", "c/1.h5", "missing.weird"]
    (tmp_path / ".git" / "objects").mkdir()
    with pytest.raises(DataError, match=r"\.git/objects holds no file of a known kind"):
        list(readers.find([tmp_path / ".git" / "objects"]))


def test_missing_files_and_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*a\.ply"):
        readers.read(tmp_path / "a.ply")
    (tmp_path / "b.ply").mkdir()
    with pytest.raises(DataError, match=r"b\.ply cannot be read: Is a directory"):
        readers.read(tmp_path / "b.ply")
    with pytest.raises(InputError, match="samples is 0"):
        readers.read(tmp_path / "a.ply", samples=0)


def test_real_meshes_have_the_surface_the_data_set_samples(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "ModelNet10"
    layout = OffLayout.recognise(folder, tmp_path)
    assert layout is not None
    for path in sorted(folder.glob("*/test/*.off"))[:40:10]:
        (ref,) = layout.refs(path)
        ours = readers.read(path).points
        theirs = layout.read(ref, 2048, False).points
        ours = (ours - ours.mean(axis=0)) / np.linalg.norm(ours - ours.mean(axis=0), axis=1).max()
        for moment in (ours.T @ ours / len(ours) - theirs.T @ theirs / len(theirs)).ravel():
            assert abs(moment) < 0.03


def test_a_missing_path_is_missing_and_no_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*scans; check the path"):
        readers.read(tmp_path / "scans")
