"""The scenes of the drawn world, and the prompts that name them.

About a tenth of the combinations of background, hat and clothes is held out: training never draws them, so that a
prompt for one asks for something new.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

# each attribute's names and how often training draws them
BACKGROUNDS: Mapping[str, float] = {
    "plain grey": 0.16,
    "plain blue": 0.1,
    "plain red": 0.1,
    "garden": 0.09,
    "beach": 0.09,
    "night city": 0.09,
    "snow": 0.09,
    "sunset": 0.09,
    "space": 0.09,
    "room": 0.1,
}
HATS: Mapping[str, float] = {
    "none": 0.45,
    "red beanie": 0.11,
    "blue cap": 0.11,
    "straw hat": 0.11,
    "party hat": 0.11,
    "top hat": 0.11,
}
CLOTHES: Mapping[str, float] = dict.fromkeys(
    ("white shirt", "yellow shirt", "striped shirt", "black suit", "green hoodie", "pink sweater"), 1 / 6
)
EXPRESSIONS: Mapping[str, float] = {"neutral": 0.4, "smiling": 0.3, "surprised": 0.15, "sad": 0.15}
LIGHTS: Mapping[str, float] = {"soft": 0.6, "warm": 0.2, "dim": 0.2}
STYLES: Mapping[str, float] = {"drawing": 0.6, "sketch": 0.2, "poster": 0.2}

SHIFTS = {"x": (-0.07, 0.07), "y": (-0.045, 0.06)}  # of the picture's side; a hat stays inside the picture
SCALES = (0.88, 1.08)
MOST_TILT = 7.0  # degrees
MOST_TOKENS = 26  # words and commas of a prompt

# what a prompt may call each attribute; the first is as good as any other
_WORDINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "background": {
        "plain grey": ("in front of a plain grey background", "plain grey wall"),
        "plain blue": ("in front of a plain blue background", "plain blue wall"),
        "plain red": ("in front of a plain red background", "plain red wall"),
        "garden": ("in a garden", "garden background"),
        "beach": ("on a beach", "at the beach"),
        "night city": ("in a night city", "night city background"),
        "snow": ("in the snow", "snow background"),
        "sunset": ("at sunset", "sunset background"),
        "space": ("in space", "space background"),
        "room": ("in a room", "room background"),
    },
    "hat": {
        "none": ("", "no hat"),
        "red beanie": ("wearing a red beanie", "red beanie"),
        "blue cap": ("wearing a blue cap", "blue cap"),
        "straw hat": ("wearing a straw hat", "yellow straw hat"),
        "party hat": ("wearing a party hat", "green party hat"),
        "top hat": ("wearing a top hat", "black top hat"),
    },
    "clothes": {name: (name, f"in a {name}") for name in CLOTHES},
    "expression": {
        "neutral": ("neutral", "neutral face"),
        "smiling": ("smiling", "a smiling face"),
        "surprised": ("surprised", "a surprised face"),
        "sad": ("sad", "a sad face"),
    },
    "light": {"soft": ("soft light",), "warm": ("warm light",), "dim": ("dim light",)},
    "style": {"drawing": ("drawing", "a drawing"), "sketch": ("sketch", "a sketch"), "poster": ("poster", "a poster")},
}
_SUBJECTS = ("portrait of a person", "a person", "person", "photo of a person", "portrait", "a face")
_DISTRACTORS = ("portrait", "color", "cinematic", "detailed", "quality", "photo")
_OMITTED = {"expression": 0.3, "clothes": 0.3, "light": 0.5, "style": 0.5}

# what `read` looks for: phrase -> attribute and name; longer phrases first
_PHRASES: Mapping[str, tuple[str, str]] = {
    **{name: ("background", name) for name in BACKGROUNDS},
    "plain gray": ("background", "plain grey"),
    "night": ("background", "night city"),
    "city": ("background", "night city"),
    "snowy": ("background", "snow"),
    "no hat": ("hat", "none"),
    "without a hat": ("hat", "none"),
    **{name: ("hat", name) for name in HATS if name != "none"},
    "beanie": ("hat", "red beanie"),
    "cap": ("hat", "blue cap"),
    **{name: ("clothes", name) for name in CLOTHES},
    "suit": ("clothes", "black suit"),
    "hoodie": ("clothes", "green hoodie"),
    "sweater": ("clothes", "pink sweater"),
    **{name: ("expression", name) for name in EXPRESSIONS},
    "smile": ("expression", "smiling"),
    "happy": ("expression", "smiling"),
    **{f"{name} light": ("light", name) for name in LIGHTS},
    **{name: ("style", name) for name in STYLES},
}
_LONGEST = max(len(phrase.split()) for phrase in _PHRASES)
WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for text in (
                *(wording for names in _WORDINGS.values() for told in names.values() for wording in told),
                *_SUBJECTS,
                *_DISTRACTORS,
                *_PHRASES,
                "and with of the",
            )
            for word in text.split()
        }
    )
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is around a person and how they are framed."""

    expression: str = "neutral"
    hat: str = "none"
    background: str = "plain grey"
    clothes: str = "white shirt"
    light: str = "soft"
    style: str = "drawing"
    x: float = 0.0  # shift as a part of the picture's side
    y: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0  # degrees, clockwise
    turn: float = 0.0  # -1..1: the head turns a little to the left or right of the picture

    @property
    def held_out(self) -> bool:
        """Whether this is a combination that training never draws."""
        return is_held_out(self.background, self.hat, self.clothes)


def is_held_out(background: str, hat: str, clothes: str) -> bool:
    """Whether training leaves a combination out."""
    return zlib.crc32(f"{background}|{hat}|{clothes}".encode()) % 10 == 0


def scene(seed: int, **fixed: object) -> Scene:
    """A scene as training draws them; fixed attributes are kept. ValueError: they leave only held-out combinations."""
    return _scene(seed, False, fixed)


def held_out_scene(seed: int, **fixed: object) -> Scene:
    """A scene that training never draws; fixed attributes are kept. ValueError: they leave no such combination."""
    return _scene(seed, True, fixed)


def prompt(scene: Scene, seed: int = 0, full: bool = False) -> str:
    """Words for a scene, at most MOST_TOKENS words and commas; background and hat are always named, others mostly.

    full: every attribute is named, a bare head too; in its shortest words where they would be too many.
    """
    random = np.random.default_rng((seed, 0x9E2))
    said: dict[str, str] = {}
    for attribute in _WORDINGS:
        wordings = _wordings(scene, attribute, full)
        wording = wordings[int(random.integers(len(wordings)))]
        omitted = random.random() < _OMITTED.get(attribute, 0.0)
        if wording and (full or not omitted):
            said[attribute] = wording
    parts = [said[attribute] for attribute in random.permutation(sorted(said))]
    if random.random() < 0.3 and not full:
        parts.append(str(random.choice(_DISTRACTORS)))
    subject = str(random.choice(_SUBJECTS))
    optional = [attribute for attribute in ("light", "style", "expression", "clothes") if attribute in said]
    shorter = [*optional, "hat", "background"] if full else []
    while _tokens(subject, parts) > MOST_TOKENS:
        if shorter:
            attribute = shorter.pop(0)
            parts[parts.index(said[attribute])] = min(_wordings(scene, attribute, full), key=lambda x: len(x.split()))
        else:
            parts.remove(said[optional.pop(0)])
    glue = " " if random.random() < 0.5 else ", "
    return subject + glue + ", ".join(parts)


def _wordings(scene: Scene, attribute: str, full: bool) -> tuple[str, ...]:
    names = _WORDINGS[attribute][getattr(scene, attribute)]
    return tuple(wording for wording in names if wording or not full)


def read(prompt: str) -> dict[str, str]:
    """The attributes that a prompt names, by attribute; unknown words are passed over, the first naming counts."""
    found: dict[str, str] = {}
    # a comma parts phrases
    words = prompt.lower().replace(",", " , ").replace(".", " , ").split()
    place = 0
    while place < len(words):
        for length in range(min(_LONGEST, len(words) - place), 0, -1):
            meaning = _PHRASES.get(" ".join(words[place : place + length]))
            if meaning:
                found.setdefault(*meaning)
                place += length
                break
        else:
            place += 1
    return found


def _tokens(subject: str, parts: list[str]) -> int:
    return len(" ".join((subject, *parts)).split()) + len(parts)


def _scene(seed: int, held_out: bool, fixed: Mapping[str, object]) -> Scene:
    random = np.random.default_rng((seed, 0x9E1, held_out))
    wanted = tuple(None if fixed.get(key) is None else str(fixed[key]) for key in ("background", "hat", "clothes"))
    combinations, shares = _combinations(held_out, wanted)
    if not combinations:
        raise ValueError(f"no {'held-out' if held_out else 'training'} combination of background, hat and clothes left")
    background, hat, clothes = combinations[int(np.searchsorted(shares, random.random()))]
    values: dict[str, object] = {"background": background, "hat": hat, "clothes": clothes}
    for attribute, names in (("expression", EXPRESSIONS), ("light", LIGHTS), ("style", STYLES)):
        values[attribute] = str(random.choice(list(names), p=list(names.values())))
    for axis, (least, most) in SHIFTS.items():
        values[axis] = float(random.uniform(least, most))
    values["scale"] = float(random.uniform(*SCALES))
    values["tilt"] = float(random.uniform(-MOST_TILT, MOST_TILT))
    values["turn"] = float(random.uniform(-1, 1))
    return Scene(**{**values, **fixed})  # type: ignore[arg-type]


@cache
def _combinations(
    held_out: bool, wanted: tuple[str | None, ...]
) -> tuple[tuple[tuple[str, str, str], ...], tuple[float, ...]]:
    """The combinations that agree with what is wanted, and their cumulated shares."""
    found = tuple(
        names
        for names in product(BACKGROUNDS, HATS, CLOTHES)
        if is_held_out(*names) == held_out
        and all(want in (None, name) for want, name in zip(wanted, names, strict=True))
    )
    shares = np.cumsum([BACKGROUNDS[one] * HATS[two] * CLOTHES[three] for one, two, three in found])
    return found, tuple(shares / shares[-1]) if found else ()
