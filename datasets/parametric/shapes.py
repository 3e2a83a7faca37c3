"""The categories: each a function that builds one object, part by part, from random proportions.

Objects stand on their feet with +z up and their front towards +x. A builder yields
``(part name, surface)`` pairs, in any units and any place: the data set centres and scales.
To add a category, write one more function under ``@category(...)`` with the names of its parts.
Categories share parts and materials on purpose (boxes on legs; bodies with handles), so that they
are told apart by how parts are arranged and proportioned, not by what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pointcanon.datasets.parametric.primitives import (
    Surface,
    box,
    extrude,
    lathe,
    loft,
    mirrored,
    rod,
    spun,
    tube,
)

__all__ = ["CATEGORIES", "Category", "Draw", "Parts"]

Parts = Iterator[tuple[str, Surface]]


class Draw:
    """The random choices of one object."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def between(self, low: float, high: float) -> float:
        """A number uniform in [low, high)."""
        return low + (high - low) * float(self._rng.random())

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._rng.random()) < probability

    def among(self, *options: int) -> int:
        """One of the options, all equally likely."""
        return options[int(self._rng.random() * len(options))]


@dataclass(frozen=True)
class Category:
    """A kind of object: the names of its parts, and the function that builds one."""

    parts: tuple[str, ...]
    build: Callable[[Draw], Parts]


CATEGORIES: dict[str, Category] = {}
"""Every category by name, in alphabetical order."""


def category(*parts: str) -> Callable[[Callable[[Draw], Parts]], Callable[[Draw], Parts]]:
    """Register a builder, under its function's name, with the parts it may yield."""

    def register(build: Callable[[Draw], Parts]) -> Callable[[Draw], Parts]:
        CATEGORIES[build.__name__] = Category(parts, build)
        return build

    return register


def _corners(x: float, y: float) -> tuple[tuple[float, float], ...]:
    return ((x, y), (x, -y), (-x, y), (-x, -y))


def _arc(
    centre: tuple[float, float], radii: tuple[float, float], start: float, end: float, steps: int
) -> NDArray[np.float64]:
    """Points ``(steps, 2)`` along an arc of an ellipse, angles in degrees."""
    angle = np.radians(np.linspace(start, end, steps))
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1) * radii + centre


def _disc(radius: float, low: float, high: float) -> Surface:
    return lathe(((radius, low), (radius, high)))


def _four_legs(
    draw: Draw, x: float, y: float, height: float, thickness: float
) -> Iterator[Surface]:
    """Square posts, or round ones that splay outwards and taper, under a seat or a top."""
    square, splay = draw.chance(0.5), height * draw.between(0.0, 0.2)
    half = thickness / 2
    for sx, sy in _corners(1, 1):
        foot_x, foot_y = sx * (x - thickness), sy * (y - thickness)
        if square:
            yield box((foot_x - half, foot_y - half, 0), (foot_x + half, foot_y + half, height))
        else:
            top = (foot_x - sx * splay, foot_y - sy * splay, height)
            yield rod((foot_x, foot_y, 0), top, half * 0.7, half)


@category("body", "wing", "tail", "engine")
def airplane(draw: Draw) -> Parts:
    length, radius = draw.between(1.7, 2.3), draw.between(0.09, 0.15)
    stern = -length / 2
    stations = (
        (0.0, 0.15),
        (0.12, 0.5),
        (0.3, 0.95),
        (0.75, 1.0),
        (0.88, 0.8),
        (0.96, 0.45),
        (1, 0),
    )
    yield (
        "body",
        lathe([(radius * width, stern + length * along) for along, width in stations], axis="x"),
    )
    span, chord = draw.between(0.75, 1.1), draw.between(0.28, 0.42)
    sweep, tip = draw.between(0.0, 0.5), draw.between(0.35, 0.7)
    root, level = draw.between(0.1, 0.3), draw.between(-0.6, 0.6) * radius
    outline = (
        (root, 0),
        (root - chord, 0),
        (root - sweep - chord * tip, span),
        (root - sweep, span),
    )
    wing = extrude(outline, level - 0.015, level + 0.015)
    yield "wing", wing
    yield "wing", mirrored(wing)
    rear, fin = stern + draw.between(0.22, 0.3), draw.between(0.26, 0.4)
    stern_tip = rear - draw.between(0.2, 0.32)
    yield (
        "tail",
        extrude(
            (
                (rear, 0),
                (stern_tip, 0),
                (stern_tip - 0.06, radius + fin),
                (rear - 0.16, radius + fin),
            ),
            -0.015,
            0.015,
            axis="y",
        ),
    )
    stabiliser = draw.between(0.28, 0.42)
    outline = ((rear, 0), (rear - 0.22, 0), (rear - 0.3, stabiliser), (rear - 0.16, stabiliser))
    top = radius + fin if draw.chance(0.25) else radius * 0.4
    plane = extrude(outline, top - 0.012, top + 0.012)
    yield "tail", plane
    yield "tail", mirrored(plane)
    for place in (0.35, 0.62)[: draw.among(0, 1, 2)]:
        front, size = root - sweep * place + 0.08, draw.between(0.045, 0.06)
        engine = lathe(((size * 0.7, front - 0.28), (size, front - 0.15), (size, front)), axis="x")
        engine = engine + np.array((0, span * place, level - size - 0.02))
        yield "engine", engine
        yield "engine", mirrored(engine)


@category("frame", "mattress", "headboard", "pillow")
def bed(draw: Draw) -> Parts:
    x, y = draw.between(0.95, 1.1), draw.between(0.45, 0.85)
    floor, deck = draw.between(0.1, 0.3), draw.between(0.08, 0.16)
    top = floor + deck
    yield "frame", box((-x, -y, floor), (x, y, top))
    for leg in _four_legs(draw, x, y, floor, 0.09):
        yield "frame", leg
    soft = draw.between(0.12, 0.25)
    yield "mattress", box((-x + 0.03, -y + 0.03, top), (x - 0.03, y - 0.03, top + soft))
    board = top + soft + draw.between(0.25, 0.6)
    yield "headboard", box((-x - draw.between(0.04, 0.1), -y, 0), (-x, y, board))
    if draw.chance(0.4):
        yield "frame", box((x, -y, 0), (x + 0.05, y, top + soft * draw.between(0.4, 1.3)))
    thick = draw.between(0.08, 0.14)
    for side in (-0.5, 0.5) if y > 0.62 else (0.0,):
        width = y * 0.4 if side else y * 0.7
        low = (-x + 0.08, side * y - width, top + soft)
        yield "pillow", box(low, (-x + 0.45, side * y + width, top + soft + thick))


@category("side", "shelf", "back", "books")
def bookshelf(draw: Draw) -> Parts:
    width, depth, height = draw.between(0.3, 0.6), draw.between(0.12, 0.2), draw.between(1.4, 2.1)
    board = draw.between(0.02, 0.04)
    for y in (-width, width - board):
        yield "side", box((-depth, y, 0), (depth, y + board, height))
    levels = np.linspace(draw.between(0.02, 0.15), height - board, draw.among(4, 5, 6))
    for level in levels:
        yield "shelf", box((-depth, -width, level), (depth, width, level + board))
    if draw.chance(0.8):
        yield "back", box((-depth, -width, 0), (-depth + 0.015, width, height))
    room = float(levels[1] - levels[0]) - board
    for level in levels[:-1]:
        if not draw.chance(0.6):
            continue
        low = -width + board
        high = low + (2 * width - 2 * board) * draw.between(0.3, 0.95)
        base, tall = level + board, room * draw.between(0.55, 0.85)
        yield "books", box((-depth * 0.9, low, base), (depth * 0.6, high, base + tall))


@category("body", "neck", "cap")
def bottle(draw: Draw) -> Parts:
    radius, height = draw.between(0.22, 0.34), draw.between(0.75, 1.15)
    shoulder, neck = draw.between(0.12, 0.35), draw.between(0.07, 0.11)
    curve = _arc((neck, height), (radius - neck, shoulder), 0, 90, 7)
    yield "body", lathe([(radius * 0.92, 0), (radius, 0.04), *curve])
    base, top = height + shoulder, height + shoulder + draw.between(0.12, 0.4)
    yield "neck", lathe(((neck, base), (neck * draw.between(0.8, 1.0), top)))
    cap = neck * draw.between(1.1, 1.4)
    yield "cap", _disc(cap, top - 0.02, top + draw.between(0.05, 0.14))


@category("body", "handle")
def bucket(draw: Draw) -> Parts:
    low, height = draw.between(0.3, 0.4), draw.between(0.65, 0.95)
    high, wall = low + draw.between(0.06, 0.22), 0.025
    yield (
        "body",
        lathe(
            ((0, 0), (low, 0), (high, height), (high - wall, height), (low - wall, wall), (0, wall))
        ),
    )
    if draw.chance(0.5):
        yield (
            "body",
            lathe(
                (
                    (high, height - 0.06),
                    (high + 0.04, height - 0.06),
                    (high + 0.04, height),
                    (high, height),
                    (high, height - 0.06),
                ),
                capped=False,
            ),
        )
    lean, rise = np.radians(draw.between(-25, 25)), draw.between(0.75, 1.1)
    arch = _arc((0, 0), (high, high * rise), 0, 180, 15)
    path = np.stack((arch[:, 1] * np.sin(lean), arch[:, 0], arch[:, 1] * np.cos(lean)), axis=-1)
    path[:, 2] += height - 0.05
    across = (np.cos(lean), 0.0, -np.sin(lean))
    yield "handle", tube(path, draw.between(0.02, 0.035), across=across)


@category("body", "cabin", "wheel")
def car(draw: Draw) -> Parts:
    length, width = draw.between(0.95, 1.15), draw.between(0.38, 0.48)
    clear, waist = draw.between(0.1, 0.18), draw.between(0.45, 0.58)
    hood = waist - draw.between(0.03, 0.12)
    cowl = draw.between(0.25, 0.45)
    body = (
        (-length, clear),
        (length, clear),
        (length, hood - 0.08),
        (length - 0.08, hood),
        (cowl, waist),
        (-length + 0.05, waist),
        (-length, waist - 0.1),
    )
    yield "body", extrude(body, -width, width, axis="y")
    roof, rake = waist + draw.between(0.25, 0.4), draw.between(0.15, 0.4)
    rear = draw.between(-length + 0.02, -0.35)
    slope = draw.between(0.02, 0.25)
    cabin = ((rear, waist), (cowl, waist), (cowl - rake, roof), (rear + slope, roof))
    inset = width - draw.between(0.02, 0.08)
    yield "cabin", extrude(cabin, -inset, inset, axis="y")
    radius, thick = draw.between(0.16, 0.22), draw.between(0.1, 0.16)
    wheel = lathe(((radius, width - thick), (radius, width + 0.03)), axis="y")
    for x in (-length * 0.6, length * 0.62):
        placed = wheel + np.array((x, 0, radius))
        yield "wheel", placed
        yield "wheel", mirrored(placed)


@category("seat", "back", "leg", "arm")
def chair(draw: Draw) -> Parts:
    x, y = draw.between(0.2, 0.26), draw.between(0.2, 0.28)
    seat, thick = draw.between(0.38, 0.5), draw.between(0.03, 0.08)
    yield "seat", box((-x, -y, seat), (x, y, seat + thick))
    if draw.chance(0.75):
        for leg in _four_legs(draw, x, y, seat, draw.between(0.035, 0.06)):
            yield "leg", leg
    else:
        yield "leg", rod((0, 0, 0.06), (0, 0, seat), 0.03)
        for angle in 2 * np.pi * np.arange(5) / 5:
            yield "leg", spun(box((0, -0.02, 0.03), (x * 1.15, 0.02, 0.07)), angle)
    base, top = seat + thick, seat + thick + draw.between(0.38, 0.6)
    lean, slab = draw.between(0.0, 0.15), draw.between(0.025, 0.05)

    def board(low: float, high: float, left: float, right: float) -> Surface:
        """A piece of the leaning back between two heights."""
        at = (low - base) / (top - base) * lean, (high - base) / (top - base) * lean
        side = (
            (-x - at[0], low),
            (-x - at[0] + slab, low),
            (-x - at[1] + slab, high),
            (-x - at[1], high),
        )
        return extrude(side, left, right, axis="y")

    style = draw.among(0, 1, 2)
    if style == 0:
        yield "back", board(base, top, -y, y)
    else:
        post = 0.045
        yield "back", board(base, top, -y, -y + post)
        yield "back", board(base, top, y - post, y)
        yield "back", board(top - 0.09, top, -y + post, y - post)
        if style == 1:
            for left in np.linspace(-y + 2 * post, y - 3 * post, draw.among(2, 3, 4)):
                yield "back", board(base, top - 0.09, left, left + post * 0.8)
        else:
            for low in np.linspace(base + 0.08, top - 0.2, draw.among(1, 2)):
                yield "back", board(low, low + 0.06, -y + post, y - post)
    if draw.chance(0.35):
        rest = base + draw.between(0.16, 0.24)
        arm = box((-x, y - 0.02, rest), (x * 0.8, y + 0.03, rest + 0.035))
        post_x = x * draw.between(0.4, 0.75)
        support = box((post_x - 0.02, y - 0.01, base - thick), (post_x + 0.02, y + 0.02, rest))
        for piece in (arm, support):
            yield "arm", piece
            yield "arm", mirrored(piece)


@category("body", "neck", "head")
def guitar(draw: Draw) -> Parts:
    angle = 2 * np.pi * np.arange(32) / 32
    waist, upper = draw.between(0.12, 0.2), draw.between(0.06, 0.12)
    # a polar outline, star-shaped by construction: two lobes, the lower one wider
    reach = 0.34 + waist * np.cos(2 * angle) - upper * np.cos(angle)
    width = draw.between(0.9, 1.15)
    outline = np.stack((reach * np.sin(angle) * width, reach * np.cos(angle)), axis=-1)
    depth = draw.between(0.03, 0.1)
    yield "body", extrude(outline, -depth, depth, axis="x")
    shoulder, nut = 0.34 + waist - upper, draw.between(1.0, 1.25)
    start = shoulder * draw.between(0.2, 0.6)
    grip = draw.between(0.03, 0.045)
    yield "neck", box((depth - 0.02, -grip, start), (depth + 0.03, grip, nut))
    head, flare = draw.between(0.18, 0.28), draw.between(1.3, 2.0)
    shape = ((-grip, nut), (grip, nut), (grip * flare, nut + head), (-grip * flare, nut + head))
    yield "head", extrude(shape, depth - 0.02, depth + 0.015, axis="x")
    if draw.chance(0.6):
        for z in nut + head * np.array((0.3, 0.55, 0.8)):
            peg = rod((depth, grip, z), (depth, grip * flare + 0.05, z), 0.012, sides=6)
            yield "head", peg
            yield "head", mirrored(peg)


@category("handle", "head")
def hammer(draw: Draw) -> Parts:
    length, grip = draw.between(0.9, 1.3), draw.between(0.035, 0.055)
    yield (
        "handle",
        lathe(
            (
                (grip, 0),
                (grip * 1.2, 0.1),
                (grip, length * 0.4),
                (grip * 0.7, length * 0.6),
                (grip * 0.8, length),
            ),
            sides=16,
        ),
    )
    thick, reach = draw.between(0.05, 0.08), draw.between(0.16, 0.28)
    yield "head", box((-thick, -thick, length - thick), (thick, thick, length + thick))
    face = thick * draw.between(1.0, 1.35)
    yield (
        "head",
        lathe(
            ((thick * 0.8, thick), (thick * 0.8, reach * 0.75), (face, reach * 0.8), (face, reach)),
            axis="x",
        )
        + np.array((0, 0, length)),
    )
    claw, droop = draw.between(0.22, 0.36), draw.between(0.06, 0.16)
    along = np.linspace(0, 1, 7)
    path = np.stack((-thick - along * claw, 0 * along, length - droop * along**2), axis=-1)
    rings = []  # the claw narrows to an edge across y
    for (x, _, z), share in zip(path, along, strict=True):
        flat = thick * (0.9 - 0.75 * share)
        rings.append(
            [
                (x, thick, z - flat),
                (x, -thick, z - flat),
                (x, -thick, z + flat),
                (x, thick, z + flat),
            ]
        )
    yield "head", loft(rings)


@category("base", "pole", "shade")
def lamp(draw: Draw) -> Parts:
    height, base = draw.between(0.8, 1.5), draw.between(0.18, 0.28)
    foot = draw.between(0.03, 0.08)
    yield "base", lathe(((base, 0), (base, foot * 0.5), (base * draw.between(0.3, 0.9), foot)))
    yield "pole", lathe(((0.025, foot), (0.025, height)), sides=12)
    if draw.chance(0.4):
        bulge, middle = draw.between(0.06, 0.12), draw.between(0.25, 0.5) * height
        yield "pole", lathe(_arc((0, middle), (bulge, bulge * 1.6), -90, 90, 9))
    low = draw.between(0.24, 0.38)
    high, tall = low * draw.between(0.4, 0.95), draw.between(0.28, 0.45)
    bottom, wall = height - tall * 0.7, 0.015
    top = bottom + tall
    yield (
        "shade",
        lathe(
            (
                (low - wall, bottom),
                (low, bottom),
                (high, top),
                (high - wall, top),
                (low - wall, bottom),
            ),
            capped=False,
        ),
    )


@category("body", "handle")
def mug(draw: Draw) -> Parts:
    low, height = draw.between(0.36, 0.46), draw.between(0.8, 1.15)
    high, wall = low * draw.between(0.92, 1.12), draw.between(0.03, 0.06)
    yield (
        "body",
        lathe(
            ((0, 0), (low, 0), (high, height), (high - wall, height), (low - wall, wall), (0, wall))
        ),
    )
    reach, span = draw.between(0.22, 0.34), height * draw.between(0.26, 0.36)
    arch = _arc(((low + high) / 2 - wall, height / 2), (reach + wall, span), -90, 90, 11)
    path = np.insert(arch, 1, 0.0, axis=1)
    yield "handle", tube(path, draw.between(0.04, 0.065), across=(0, 1, 0))


@category("body", "nose", "fin", "engine")
def rocket(draw: Draw) -> Parts:
    radius, height = draw.between(0.14, 0.24), draw.between(0.9, 1.4)
    yield "body", _disc(radius, 0.15, height)
    tip = draw.between(0.35, 0.6)
    yield "nose", lathe(_arc((0, height), (radius, tip), 0, 90, 9))
    yield "engine", lathe(((radius * draw.between(0.7, 0.95), 0), (radius * 0.5, 0.15)))
    count, reach = draw.among(3, 4), radius + draw.between(0.18, 0.32)
    root, drop = draw.between(0.35, 0.6), draw.between(-0.1, 0.1)
    outline = (
        (radius * 0.8, 0.15),
        (reach, drop),
        (reach, drop + root * 0.4),
        (radius * 0.8, 0.15 + root),
    )
    fin = extrude(outline, -0.015, 0.015, axis="y")
    for angle in 2 * np.pi * np.arange(count) / count:
        yield "fin", spun(fin, angle)
    if draw.chance(0.3):
        size, tall = radius * 0.5, height * draw.between(0.4, 0.6)
        booster = lathe(((size, 0.08), (size, tall), (0, tall + size * 2)), sides=16)
        booster = booster + np.array((0, radius + size, 0))
        yield "engine", booster
        yield "engine", mirrored(booster)


@category("seat", "back", "arm", "leg")
def sofa(draw: Draw) -> Parts:
    x, y = draw.between(0.38, 0.48), draw.between(0.75, 1.15)
    floor, seat = draw.between(0.05, 0.15), draw.between(0.36, 0.46)
    arm, rest = draw.between(0.1, 0.2), seat + draw.between(0.12, 0.25)
    back, deep = seat + draw.between(0.3, 0.5), draw.between(0.15, 0.25)
    yield "seat", box((-x, -y, floor), (x, y, seat - 0.12))
    inside = y - arm
    cushions = np.linspace(-inside, inside, draw.among(2, 3, 4))
    for left, right in pairwise(cushions):
        yield "seat", box((-x + deep, left + 0.01, seat - 0.12), (x, right - 0.01, seat))
    lean = draw.between(0.0, 0.1)
    side = ((-x, floor), (-x + deep, floor), (-x + deep - lean, back), (-x - lean, back))
    yield "back", extrude(side, -y, y, axis="y")
    panel = box((-x, inside, floor), (x, y, rest))
    yield "arm", panel
    yield "arm", mirrored(panel)
    for cx, cy in _corners(x - 0.06, y - 0.06):
        yield "leg", box((cx - 0.03, cy - 0.03, 0), (cx + 0.03, cy + 0.03, floor))


@category("seat", "leg", "rung")
def stool(draw: Draw) -> Parts:
    size, height, thick = (
        draw.between(0.16, 0.21),
        draw.between(0.55, 0.8),
        draw.between(0.03, 0.07),
    )
    if draw.chance(0.6):
        yield "seat", _disc(size, height, height + thick)
    else:
        yield "seat", box((-size, -size, height), (size, size, height + thick))
    count, splay = draw.among(3, 4), draw.between(1.0, 1.4)
    top = size * (0.75 if count == 3 else 0.9)
    low, radius = top * splay, draw.between(0.014, 0.024)
    turn = np.pi / count
    for angle in 2 * np.pi * np.arange(count) / count:
        yield "leg", spun(rod((low, 0, 0), (top, 0, height), radius), angle + turn)
    level = height * draw.between(0.25, 0.4)
    at = low + (top - low) * level / height
    if draw.chance(0.5):
        yield "rung", lathe(_arc((at, level), (0.014, 0.014), 0, 360, 7), capped=False)
    else:
        chord = at * np.sin(turn)
        rung = rod((at * np.cos(turn), -chord, level), (at * np.cos(turn), chord, level), 0.012)
        for angle in 2 * np.pi * np.arange(count) / count:
            yield "rung", spun(rung, angle)


@category("top", "leg", "shelf")
def table(draw: Draw) -> Parts:
    x, y = draw.between(0.35, 0.5), draw.between(0.4, 0.9)
    height, thick = draw.between(0.45, 0.75), draw.between(0.03, 0.07)
    if draw.chance(0.25):
        yield "top", _disc(y * 0.8, height, height + thick)
        yield "leg", rod((0, 0, 0.05), (0, 0, height), draw.between(0.03, 0.06))
        yield "leg", lathe(((y * draw.between(0.35, 0.5), 0), (0.05, 0.06)))
        return
    yield "top", box((-x, -y, height), (x, y, height + thick))
    if draw.chance(0.2):
        for side in (-1, 1):
            middle = side * (y - 0.05)
            yield "leg", box((-x * 0.9, middle - 0.02, 0), (x * 0.9, middle + 0.02, height))
    else:
        for leg in _four_legs(draw, x, y, height, draw.between(0.05, 0.09)):
            yield "leg", leg
    if draw.chance(0.3):
        level = height * draw.between(0.2, 0.4)
        yield "shelf", box((-x * 0.85, -y * 0.85, level), (x * 0.85, y * 0.85, level + 0.025))


@category("foot", "body", "lip")
def vase(draw: Draw) -> Parts:
    foot, stand = draw.between(0.14, 0.24), draw.between(0.04, 0.12)
    yield "foot", lathe(((foot, 0), (foot * draw.between(0.6, 0.95), stand)))
    height, belly, at = draw.between(0.7, 1.2), draw.between(0.3, 0.48), draw.between(0.3, 0.65)
    throat, wall = draw.between(0.1, 0.2), 0.02
    heights = np.linspace(0, 1, 13)
    # half cosines from foot to belly and from belly to throat
    rising = heights < at
    phase = np.where(rising, heights / at, (1 - heights) / (1 - at))
    low = np.where(rising, foot * 0.8, throat)
    radii = low + (belly - low) * (1 - np.cos(np.pi * phase)) / 2
    outside = np.stack((radii, stand + height * heights), axis=-1)
    inside = (outside - (wall, 0))[::-1]
    yield "body", lathe([(0, stand), *outside, *inside, (0, stand)])
    flare, rim = throat * draw.between(1.15, 1.8), stand + height
    tall = draw.between(0.06, 0.2)
    yield (
        "lip",
        lathe(
            (
                (throat - wall, rim),
                (throat, rim),
                (flare, rim + tall),
                (flare - wall, rim + tall),
                (throat - wall, rim),
            ),
            capped=False,
        ),
    )
