"""Where panels lie on a page."""

from __future__ import annotations

from .layers import Rect


def frame_of(number: int, count: int, canvas: tuple[int, int]) -> Rect:
    """Panel `number` (from 0) of `count` on a page, in reading order, with gutters of 2 % of the page."""
    width, height = canvas
    columns = 1
    while columns * _rows_for(columns, width, height) < count:
        columns += 1
    rows = -(-count // columns)
    gutter = max(1, round(min(width, height) * 0.02))
    w = (width - gutter * (columns + 1)) // columns
    h = (height - gutter * (rows + 1)) // rows
    row, column = divmod(number, columns)
    return (gutter + column * (w + gutter), gutter + row * (h + gutter), w, h)


def _rows_for(columns: int, width: int, height: int) -> int:
    """Rows of about square panels."""
    return max(1, round(height / (width / columns)))
