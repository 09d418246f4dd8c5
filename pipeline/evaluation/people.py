"""Whom and what is drawn: held-out people of the drawn world, or a folder of people and a list of prompts."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingsInvalid

if TYPE_CHECKING:
    from pipeline.miniature.people import Person
    from pipeline.miniature.scenes import Scene

MOST_PEOPLE = 10_000  # of one seed; the next seed's people begin after them
PAPER_PROMPTS = Path(__file__).with_name("prompts.txt")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Somebody to be drawn.

    reference: the bytes of the photo that conditions the pictures. second: another photo of the same person, which the
    pictures are compared with and no network has seen; None where there is only one. person: who was drawn, in the
    drawn world.
    """

    name: str
    reference: bytes
    second: bytes | None = None
    person: "Person | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A picture to be made: of which subject, from which prompt and noise; scene: what the prompt means, if drawn."""

    subject: int
    prompt: str
    seed: int
    scene: "Scene | None" = None


def drawn(people: int, seed: int) -> tuple[list[Subject], list[Case]]:
    """`people` people that no network was trained on, each with one prompt that none was trained on.

    The seed decides everything: the people (their seeds begin at FIRST_HELD_OUT), the two drawings of each, the prompts
    (held-out combinations of background, hat and clothes) and the noise. Both drawings of a person are bare-headed and
    in different scenes; the reference is in soft light and plainly drawn, so that its colours are the person's.

    Raises SettingsInvalid.
    """
    from pipeline.miniature import people as world
    from pipeline.miniature.scenes import held_out_scene, prompt, scene
    from pipeline.miniature.world import draw

    if not 1 <= people <= MOST_PEOPLE:
        raise SettingsInvalid(f"people is {people}; choose 1 to {MOST_PEOPLE}.")
    subjects, cases = [], []
    for index in range(people):
        number = world.FIRST_HELD_OUT + MOST_PEOPLE * seed + index
        somebody = world.person(number)
        plain, other = scene(2 * number, hat="none", light="soft", style="drawing"), scene(2 * number + 1, hat="none")
        reference, second = (png(draw(somebody, each).pixels) for each in (plain, other))
        wanted = held_out_scene(number)
        subjects.append(Subject(f"person {number}", reference, second, somebody))
        # full, for what a prompt leaves out nobody can check
        cases.append(Case(index, prompt(wanted, number, full=True), number, wanted))
    return subjects, cases


def photographed(
    folder: Path, prompts: Sequence[str], repeats: int = 1, seed: int = 0
) -> tuple[list[Subject], list[Case]]:
    """Every person of a folder with every prompt, `repeats` pictures each.

    The folder holds a folder per person; of its photos, by name, the first is the reference and the next, where there
    is one, what the pictures are compared with. Noise is the same for all people. Raises SettingsInvalid.
    """
    subjects = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        photos = sorted(path for path in place.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
        if photos:
            first, second = photos[0].read_bytes(), photos[1].read_bytes() if len(photos) > 1 else None
            subjects.append(Subject(place.name, first, second))
    if not subjects:
        raise SettingsInvalid(f"{folder} holds no folder with a .jpg, .png or .webp photo: one folder per person.")
    cases = [
        Case(index, prompt, seed + repeats * line + repeat)
        for index in range(len(subjects))
        for line, prompt in enumerate(prompts)
        for repeat in range(repeats)
    ]
    return subjects, cases


def read_prompts(file: Path = PAPER_PROMPTS) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Without a file: the 20 evaluation prompts of the paper. Raises SettingsInvalid where there is none, OSError.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise SettingsInvalid(f"{file} is not UTF-8 (at byte {error.start}); save it in UTF-8.") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise SettingsInvalid(f"{file} holds no prompt: write one a line.")
    return prompts


def png(rgb: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) as a PNG file."""
    from pipeline.picture import encode

    return encode(rgb, "png", 100)


def pixels(data: bytes) -> NDArray[np.uint8]:
    """An image file that this program wrote -> pixels (H, W, 3)."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), np.uint8)
