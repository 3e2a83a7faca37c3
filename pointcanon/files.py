"""Writing files: whether it will be possible, and then all of a file or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from pointcanon.errors import DataError, UsageError

__all__ = ["atomic_write", "require_writable"]


def atomic_write(path: str | Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that any reader, at any time, sees the old one or the new one, whole.

    Args:
        path: Missing folders are made.
        content: Text is written as UTF-8.
        durable: Have it on the disk before it takes the place of the old one, so that this holds
            after a power cut too. For what took hours to make: it costs a wait for the disk.

    Raises:
        DataError: If the file cannot be written; an old one is left as it is.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        if _is_stream(Path(path)):
            Path(path).write_bytes(content)
        else:
            _replace(Path(path).resolve(), content, durable)  # a link stays one
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; name another place") from error


def _is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe, such as ``/dev/stdout``, which nothing can replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _replace(path: Path, content: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the file, so that the last step stays on one disk; a name no other writer has
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | Path, size: int = 0) -> Path:
    """The path of a file that is to be written later, once it is known that it can be.

    Commands ask this before their work rather than find out an hour later. Missing folders are
    made.

    Args:
        path: Of the file.
        size: Bytes that it will have at least.

    Raises:
        UsageError: If it cannot.
    """
    path = Path(path)
    if _is_stream(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}; name another place") from error
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: {path.parent} is read-only; name another place")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UsageError(
            f"cannot write {path}: it takes {size:,} bytes and {free:,} are free; make room, or "
            "name another place"
        )
    return path
