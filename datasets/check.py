"""What is at a data root: every file is read once, and what is wrong is reported, not raised."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcanon.datasets import (
    modelnet40_c,
    modelnet_layouts,
    scan_object_nn,
    shapenet_part_layouts,
)
from pointcanon.datasets.modelnet40_c import ModelNet40CFiles
from pointcanon.datasets.modelnet_layouts import Layout, Ref
from pointcanon.datasets.rna import RnaFile, rna_file_at
from pointcanon.datasets.scan_object_nn import ScanObjectNNFiles
from pointcanon.datasets.shapenet_part_layouts import PartLayout, PygLayout
from pointcanon.errors import DataError, InputError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LAYOUTS", "DataReport", "Place", "check"]

LAYOUTS = (*modelnet_layouts.LAYOUTS, PygLayout.name, RnaFile.name, ModelNet40CFiles.name)
"""Names of the layouts there are."""

Reader = Layout | PartLayout | RnaFile | ScanObjectNNFiles | ModelNet40CFiles
Scan = Iterator[tuple[Ref, bytes | DataError]]


@dataclass(frozen=True)
class Place:
    """A cloud: its split, its file (and row) inside the data set's folder, and its class."""

    split: str
    cloud: str
    category: str


@dataclass(frozen=True)
class DataReport:
    """What :func:`check` found.

    Attributes:
        root: The folder of the layout.
        dataset: ``"ModelNet40"``, ``"ModelNet10"``, ``"ModelNet40-C"``, ``"ShapeNetPart"``,
            ``"ScanObjectNN"`` and its variant, or ``"RNA"``.
        layout: One of :data:`LAYOUTS`.
        coordinate_frame: Name of the frame of its files.
        counts: Readable clouds by official split and class.
        missing: By split, what should be there and is not: listed files, classes without meshes.
        duplicates: Groups of clouds with the same content.
        unreadable: By file (and row), what is wrong with it.
    """

    root: str
    dataset: str
    layout: str
    coordinate_frame: str
    counts: dict[str, dict[str, int]]
    missing: dict[str, list[str]]
    duplicates: list[list[Place]]
    unreadable: dict[str, str]

    @property
    def totals(self) -> dict[str, int]:
        """Readable clouds by split."""
        return {split: sum(counts.values()) for split, counts in self.counts.items()}

    @property
    def shared(self) -> list[list[Place]]:
        """The duplicates that lie in more than one split, so that training sees test clouds."""
        return [group for group in self.duplicates if len({p.split for p in group}) > 1]

    @property
    def ok(self) -> bool:
        """Whether all that should be there is there and can be read. Duplicates are a property of
        the data set rather than damage to this copy, so they do not count."""
        return not self.unreadable and not any(self.missing.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {**asdict(self), "totals": self.totals, "ok": self.ok}

    def render(self, console: Console) -> None:
        """Print it for a person."""
        from rich.markup import escape
        from rich.table import Table

        console.print(escape(f"{self.dataset} at {self.root}"), soft_wrap=True)
        table = Table(show_footer=True)
        table.add_column("class", footer="all")
        for split, total in self.totals.items():
            table.add_column(split, justify="right", footer=f"{total:,}")
        for name in next(iter(self.counts.values())):
            table.add_row(name, *(f"{counts[name]:,}" for counts in self.counts.values()))
        console.print(table)
        console.print(f"layout {self.layout}, coordinate frame {self.coordinate_frame}")
        for line in self._findings():
            console.print(escape(line), soft_wrap=True)

    def _findings(self) -> Iterator[str]:
        for split, names in self.missing.items():
            if names:
                yield f"missing from {split}: {len(names):,} (first: {names[0]})"
        across = "both train and test" if len(self.counts) == 2 else "more than one split"
        yield (
            f"duplicates: {len(self.duplicates):,} groups of equal clouds, "
            f"{len(self.shared):,} of them in {across}"
        )
        for group in self.shared[:5]:
            yield "  " + " = ".join(f"{p.split} {p.cloud} ({p.category})" for p in group)
        yield f"unreadable: {len(self.unreadable):,}"
        for error in self.unreadable.values():
            yield f"  {error}"


def check(root: str | Path, layout: str | None = None, variant: str | None = None) -> DataReport:
    """Read all of the data set at ``root``, whichever it is, in whichever of its layouts.

    Every file is opened and every cloud looked at, one file in memory at a time; a file or cloud
    that cannot be read is noted and the rest go on.

    Args:
        root: The folder of a layout, or its parent.
        layout: Which one, where the root holds several.
        variant: Of ScanObjectNN which one, where the root holds several.

    Raises:
        DataError: If there is nothing to check, or more than one thing.
        InputError: On an unknown layout.
    """
    if layout not in (None, *LAYOUTS):
        raise InputError(f"unknown layout {layout!r}; choose one of: {', '.join(LAYOUTS)}")
    found = _readers(root)
    usable = [
        reader
        for reader in found
        if layout in (None, reader.name) and variant in (None, getattr(reader, "variant", None))
    ]
    if len(usable) != 1:
        there = ", ".join(f"{each.dataset} in {each.folder} ({each.name})" for each in found)
        asked = "" if layout is None else f", not one layout {layout!r}"
        asked += "" if variant is None else f", not one variant {variant!r}"
        raise DataError(
            f"data root {root} holds {there}{asked}; give one of these folders, and the layout or "
            "variant where it holds several"
        )
    return _check(usable[0])


def _readers(root: str | Path) -> list[Reader]:
    """Of every data set there; that of ModelNet alone says what is wrong with an empty place."""
    place = Path(root).expanduser()
    single = (rna_file_at(place), modelnet40_c.files_at(place))
    others: list[Reader] = [
        *shapenet_part_layouts.layouts_at(place),
        *scan_object_nn.files_at(place),
        *(reader for reader in single if reader is not None),
    ]
    try:
        return [*modelnet_layouts.layouts_at(root), *others]
    except DataError:
        if others:
            return others
        raise


def _check(reader: Reader) -> DataReport:
    counts: dict[str, Counter[str]] = {}
    missing: dict[str, list[str]] = {}
    unreadable: dict[str, str] = {}
    places: defaultdict[bytes, list[Place]] = defaultdict(list)
    for split in reader.splits:
        counts[split] = Counter(dict.fromkeys(reader.classes, 0))
        try:
            scans, missing[split] = _scans(reader, split)
        except DataError as error:
            scans, missing[split] = [], []
            unreadable[f"the list of {split}"] = str(error)
        for path, scan in scans:
            for cloud, category, content in _clouds(reader, path, scan):
                if isinstance(content, DataError):
                    unreadable[cloud] = str(content)
                else:
                    counts[split][category] += 1
                    places[content].append(Place(split, cloud, category))
    return DataReport(
        root=str(reader.folder),
        dataset=reader.dataset,
        layout=reader.name,
        coordinate_frame=reader.coordinate_frame,
        counts={split: dict(counter) for split, counter in counts.items()},
        missing=missing,
        duplicates=[group for group in places.values() if len(group) > 1],
        unreadable=unreadable,
    )


def _scans(reader: Reader, split: str) -> tuple[list[tuple[Path, Callable[[], Scan]]], list[str]]:
    """How to go through each file of a split that is there, and names of those that are not."""
    if isinstance(reader, RnaFile):
        return [(reader.path, partial(reader.clouds, split))], []
    files, missing = reader.files(split, reader.classes)
    return [(path, partial(reader.scan, path)) for path in files], missing


def _clouds(
    reader: Reader, path: Path, scan: Callable[[], Scan]
) -> Iterator[tuple[str, str, bytes | DataError]]:
    """Name, class and digest (or error) of the clouds of a file; a file that fails is one entry."""
    try:
        for ref, content in scan():
            yield _inside(reader, ref), ref.category, content
    except DataError as error:
        yield _inside(reader, Ref(path, None, "")), "", error


def _inside(reader: Reader, ref: Ref) -> str:
    return str(ref._replace(path=ref.path.relative_to(reader.folder)))
