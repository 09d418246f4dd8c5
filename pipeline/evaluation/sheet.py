"""Sheets for the eye: people under rising id_weights, a person mixed from two, two people in one picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pipeline.evaluation.painting import FULL, NOBODY, Condition, Painter, photo
from pipeline.evaluation.people import Case, Subject, pixels
from pipeline.faces import Pixels
from pipeline.request import Mask, Person

PAPER, INK = (255, 255, 255), (60, 60, 60)
GAP, CAPTION, LINE, TEXT_SIZE = 6, 26, 16, 13  # pixels
COLUMNS = (NOBODY, Condition(0.5), FULL)
LEFT, RIGHT = Mask(box=(0.0, 0.0, 0.5, 1.0)), Mask(box=(0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A picture of a sheet and what stands beneath it."""

    rgb: Pixels
    caption: str = ""


def people_sheet(painter: Painter, subjects: Sequence[Subject], cases: Sequence[Case]) -> Pixels:
    """A row per case: the reference photo, and the picture without identity, at id_weight 0.5 and at 1."""
    rows = []
    for case in cases:
        subject = subjects[case.subject]
        tiles = [Tile(pixels(subject.reference), "reference")]
        for condition in COLUMNS:
            name = "no identity" if condition == NOBODY else f"id_weight {condition.id_weight:g}"
            tiles.append(Tile(painter.paint(subject, case, condition), name))
        rows.append(labelled(tiles, case.prompt))
    return stacked(rows)


def mixed_sheet(painter: Painter, pairs: Sequence[tuple[Subject, Subject]], cases: Sequence[Case]) -> Pixels:
    """A row per pair: both references, each alone, and one person of both photos with fusion mean and concat."""
    rows = []
    for (one, other), case in zip(pairs, cases, strict=True):
        tiles = [Tile(pixels(one.reference), "photo 1"), Tile(pixels(other.reference), "photo 2")]
        for name, photos, fusion in (
            ("1 alone", (one,), "mean"),
            ("both, mean", (one, other), "mean"),
            ("both, concat", (one, other), "concat"),
            ("2 alone", (other,), "mean"),
        ):
            tiles.append(Tile(draw(painter, case, [person(photos, fusion=fusion)]), name))
        rows.append(labelled(tiles, case.prompt))
    return stacked(rows)


def together_sheet(painter: Painter, pairs: Sequence[tuple[Subject, Subject]], cases: Sequence[Case]) -> Pixels:
    """A row per pair: both references, and a wide picture in which each person acts in a half of their own."""
    rows = []
    for (one, other), case in zip(pairs, cases, strict=True):
        tiles = [Tile(pixels(one.reference), "photo 1"), Tile(pixels(other.reference), "photo 2")]
        both = [person((one,), mask=LEFT), person((other,), mask=RIGHT)]
        tiles.append(Tile(draw(painter, case, both, wide=2), "1 in the left half, 2 in the right half"))
        rows.append(labelled(tiles, case.prompt))
    return stacked(rows)


def person(subjects: Sequence[Subject], **fields: Any) -> Person:
    """One person of a request, from the references of one or several subjects."""
    return Person(photos=tuple(photo(subject.reference) for subject in subjects), **fields)


def draw(painter: Painter, case: Case, people: Sequence[Person], wide: int = 1) -> Pixels:
    """A case's prompt and noise with these people; `wide`: as many of the usual widths."""
    return painter.picture(painter.format.request(case, people, wide), *(painter.identity(each) for each in people))


def labelled(tiles: Sequence[Tile], prompt: str) -> Pixels:
    """A row of tiles of one height, each with its caption beneath, and the prompt above."""
    height = max(tile.rgb.shape[0] for tile in tiles)
    columns = []
    for tile in tiles:
        rgb = tile.rgb
        if rgb.shape[0] != height:
            width = round(rgb.shape[1] * height / rgb.shape[0])
            rgb = np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        columns.append(_framed(np.vstack((rgb, written(tile.caption, rgb.shape[1]))), right=GAP))
    tallest = max(column.shape[0] for column in columns)
    row = np.hstack([_framed(column, bottom=tallest - column.shape[0]) for column in columns])
    return _framed(np.vstack((written(prompt, row.shape[1]), row)), left=GAP)


def written(text: str, width: int) -> Pixels:
    """Text on a white strip (H, width, 3), in as many lines as it needs."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT_SIZE)
    lines = textwrap.wrap(text, max(1, int(width / font.getlength("n")))) or [""]
    strip = Image.new("RGB", (width, CAPTION + LINE * (len(lines) - 1)), PAPER)
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((0, LINE * number + 5), line, INK, font)
    return np.asarray(strip, np.uint8)


def stacked(rows: Sequence[Pixels]) -> Pixels:
    """Rows one under another, on white."""
    width = max(row.shape[1] for row in rows)
    wide = [_framed(row, right=width - row.shape[1], bottom=GAP) for row in rows]
    return np.asarray(np.vstack(wide), np.uint8)


def _framed(rgb: Pixels, left: int = 0, right: int = 0, bottom: int = 0) -> Pixels:
    return np.asarray(cv2.copyMakeBorder(rgb, 0, bottom, left, right, cv2.BORDER_CONSTANT, value=PAPER), np.uint8)
