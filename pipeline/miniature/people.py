"""The people of the drawn world: a vector of traits, and what a person looks like as a function of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TRAITS = (
    "skin_tone",  # fair .. dark
    "skin_warmth",  # rosy .. golden
    "hair_tone",  # black .. fair
    "hair_warmth",  # ash and grey .. red and gold
    "face_width",
    "jaw",
    "eye_size",
    "eye_spacing",
    "brow_weight",
    "nose_size",
    "mouth_width",
    "lip_colour",  # like the skin .. red
)
# each kind's names and how often they occur
KINDS: Mapping[str, Mapping[str, float]] = {
    "hair_style": dict.fromkeys(("bald", "short", "long", "bob", "curly", "afro", "buns", "mohawk"), 1 / 8),
    "hair_dye": {"none": 0.85, "blue": 0.05, "pink": 0.05, "violet": 0.05},
    "eye_colour": {"brown": 0.25, "blue": 0.25, "green": 0.25, "amber": 0.25},
    "glasses": {
        "none": 0.46,
        "round black": 0.09,
        "round red": 0.09,
        "round blue": 0.09,
        "square black": 0.09,
        "square red": 0.09,
        "square blue": 0.09,
    },
    "beard": {"none": 0.48, "stubble": 0.13, "goatee": 0.13, "moustache": 0.13, "full": 0.13},
    "mark": {"none": 0.46, "freckles": 0.18, "mole left": 0.18, "mole right": 0.18},
    "earrings": {"none": 0.6, "gold": 0.2, "turquoise": 0.2},
}
VECTOR_SIZE = len(TRAITS) + sum(len(names) for names in KINDS.values())
FIRST_HELD_OUT = 1_000_000  # people with seeds below are for training, from it on held out

_SKIN = np.array(
    ((255, 226, 206), (244, 200, 168), (222, 166, 124), (178, 120, 80), (126, 80, 54), (84, 52, 38)), np.float64
)
_HAIR_ASH = np.array(((28, 28, 34), (84, 74, 70), (156, 148, 142), (232, 230, 226)), np.float64)
_HAIR_WARM = np.array(((58, 24, 16), (136, 56, 24), (214, 104, 34), (250, 210, 110)), np.float64)
_DYES = {"blue": (52, 104, 214), "pink": (240, 110, 170), "violet": (126, 66, 178)}


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """A person's vector (VECTOR_SIZE,): traits in -1..1, then each kind one-hot; and what it says, for reading."""

    vector: NDArray[np.float32]
    traits: Mapping[str, float]
    skin: NDArray[np.float32]  # (3,) RGB in 0..255
    hair: NDArray[np.float32]  # (3,) RGB in 0..255
    hair_style: str
    eye_colour: str
    glasses: str  # "none" or shape and colour
    beard: str
    mark: str
    earrings: str


def person(seed: int) -> Person:
    """The person of a seed: traits uniform and independent, kinds by their frequencies."""
    random = np.random.default_rng((seed, 0x9E0))
    parts = [random.uniform(-1, 1, len(TRAITS))]
    for names in KINDS.values():
        parts.append(np.eye(len(names))[random.choice(len(names), p=list(names.values()))])
    return person_from(np.concatenate(parts))


def person_from(vector: ArrayLike) -> Person:
    """The person nearest to a vector (VECTOR_SIZE,): traits are clipped, each kind is its largest entry."""
    given = np.asarray(vector, np.float32)
    exact = np.zeros(VECTOR_SIZE, np.float32)
    start = len(TRAITS)
    exact[:start] = np.clip(given[:start], -1, 1)
    kinds: dict[str, str] = {}
    for kind, names in KINDS.items():
        best = int(np.argmax(given[start : start + len(names)]))
        exact[start + best] = 1
        kinds[kind] = list(names)[best]
        start += len(names)
    exact.flags.writeable = False
    traits = dict(zip(TRAITS, (float(value) for value in exact), strict=False))
    dye = kinds.pop("hair_dye")
    return Person(exact, traits, _skin(traits), _hair(traits, dye), **kinds)


def mix(one: Person, other: Person, share: float = 0.5) -> Person:
    """Somebody between two people; share is the other's part. Traits are averaged, a kind is the greater part's."""
    return person_from((1 - share) * one.vector + share * other.vector)


def _skin(traits: Mapping[str, float]) -> NDArray[np.float32]:
    warmth = traits["skin_warmth"]
    colour = _along(_SKIN, traits["skin_tone"]) * (1 - 0.02 * warmth, 1 + 0.035 * warmth, 1 - 0.1 * warmth)
    return np.clip(colour, 0, 255).astype(np.float32)


def _hair(traits: Mapping[str, float], dye: str) -> NDArray[np.float32]:
    tone, warm = traits["hair_tone"], (traits["hair_warmth"] + 1) / 2
    colour = (1 - warm) * _along(_HAIR_ASH, tone) + warm * _along(_HAIR_WARM, tone)
    if dye != "none":
        colour = np.array(_DYES[dye]) * (1 + 0.2 * tone)
    return np.clip(colour, 0, 255).astype(np.float32)


def _along(stops: NDArray[np.float64], position: float) -> NDArray[np.float64]:
    """The colour (3,) at a position in -1..1 along evenly spaced stops (n, 3)."""
    places = np.linspace(-1, 1, len(stops))
    return np.array([np.interp(position, places, channel) for channel in stops.T])
