"""Files are written whole or not at all, and it is known beforehand whether they can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pointcanon.errors import DataError, UsageError
from pointcanon.files import atomic_write, require_writable


def test_text_and_bytes_are_written_in_folders_that_are_made(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.txt", "grün")
    atomic_write(tmp_path / "new" / "b.bin", b"\0\1")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "grün".encode()
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\0\1"
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_what_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match=r"cannot write .*a\.txt: disk full"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("first", "second"):
        atomic_write(tmp_path / "link", text)
        assert (tmp_path / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_a_device_is_written_to_and_not_replaced() -> None:
    device = require_writable(os.devnull)
    atomic_write(device, "gone")
    assert not device.is_file()


def test_what_can_be_written_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require_writable(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    with pytest.raises(UsageError, match="it is a folder"):
        require_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*a\.json"):
        require_writable(tmp_path / "file" / "a.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="read-only"):
        require_writable(tmp_path / "a.json")
