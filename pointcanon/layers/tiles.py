"""Work on a batch piece by piece, so that what is computed in between stays in cache."""

from __future__ import annotations

from collections.abc import Iterator

from pointcanon.portable import exporting

__all__ = ["TILE", "tiles"]

TILE = 1 << 19
"""Numbers held at once; two megabytes in float32."""


def tiles(clouds: int, rows: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a batch, in order: all rows of some clouds, or some rows of one.

    A program, whose sizes are open, does all at once.

    Args:
        clouds: Of the batch.
        rows: Of each cloud.
        numbers: That are computed for each row.
    """
    if exporting():
        yield slice(None), slice(None)
        return
    most = max(1, TILE // max(1, numbers))
    some_clouds, some_rows = max(1, most // max(1, rows)), min(most, max(1, rows))
    for cloud in range(0, max(1, clouds), some_clouds):
        for row in range(0, max(1, rows), some_rows):
            yield slice(cloud, cloud + some_clouds), slice(row, row + some_rows)
