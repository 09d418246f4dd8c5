"""Reading a picture of the drawn world by its pixels alone: which person, which background, which hat.

Each question is answered by true drawings of the possible answers in the picture's own scene: the nearest one, by the
mean squared difference of pixels, wins. No network has a say but the detector, whose five points align the faces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.evaluation.metrics import distances
from pipeline.evaluation.people import Case, Subject
from pipeline.evaluation.run import Reading
from pipeline.faces import Pixels
from pipeline.models.alignment import FFHQ_SIZE, FFHQ_TEMPLATE, similarity

if TYPE_CHECKING:
    from pipeline.miniature.people import Person
    from pipeline.miniature.scenes import Scene
    from pipeline.miniature.world import Drawing

DRAWN = 128  # pixels: drawings to compare with need not be larger
HEAD = 64  # pixels of an aligned head's edge
HEAD_SHARE = 0.7  # FFHQ's crop is made this much smaller in it, as hair and hats reach beyond the crop, ...
HEAD_SHIFT = (77.0, 117.0)  # ... and moved to its middle, and down
STRANGERS = (3, 8)  # seeds of the people who wear the hats: with a narrow and with a wide face
HAT = 18  # BiSeNet's number
HAT_ERROR = 0.48  # of the hats' contrast: 0.4 is seldom exceeded by the right hat, 0.55 seldom undercut by bare hair
BACKDROP = 32  # pixels of a whole picture's edge, for its background


@dataclass(frozen=True, slots=True, eq=False)
class Hat:
    """A hat on an aligned head: which of its pixels it covers (HEAD, HEAD), and their colours (n, 3) float32."""

    where: NDArray[np.bool_]
    colours: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """True drawings of one scene: the heads of everybody (N, ...), every hat on some strangers, all backgrounds.

    contrast: how far the colours of all hats lie from their mean in the scene's light and style.
    """

    scene: "Scene"
    people: NDArray[np.float32]
    hats: Mapping[str, Sequence[Hat]]
    contrast: float
    backgrounds: Mapping[str, NDArray[np.float32]]

    def hat_of(self, face: NDArray[np.float32]) -> str:
        """The hat of an aligned head, "none" where it looks like none of them enough."""
        errors = {
            name: min(float(np.sqrt(np.mean((face[hat.where] - hat.colours) ** 2))) for hat in worn)
            for name, worn in self.hats.items()
        }
        best = min(errors, key=lambda name: errors[name])
        return best if errors[best] < HAT_ERROR * self.contrast else "none"

    def background_of(self, rgb: Pixels) -> str:
        """The background of a picture: the drawn one that is nearest beside and above the head."""
        seen = backdrop(rgb)
        return min(self.backgrounds, key=lambda name: float(distances(seen, self.backgrounds[name][None])[0]))


class Drawings:
    """Compares pictures with drawings of these people; keeps the drawings of the scene it was asked about last."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self._people = [subject.person for subject in subjects if subject.person is not None]
        self._last: Answers | None = None

    def read(self, case: Case, rgb: Pixels, landmarks: NDArray[np.float32] | None) -> Reading:
        """What a picture of a case shows; without a face only the background can be right."""
        assert case.scene is not None
        if self._last is None or self._last.scene is not case.scene:
            self._last = answers(case.scene, self._people)
        background = float(self._last.background_of(rgb) == case.scene.background)
        if landmarks is None:
            return Reading(0.0, background, 0.0)
        face = head(rgb, landmarks)
        right = int(np.argmin(distances(face, self._last.people))) == case.subject
        return Reading(float(right), background, float(self._last.hat_of(face) == case.scene.hat))


def answers(scene: "Scene", people: "Sequence[Person]") -> Answers:
    """What pictures of a scene may show, facing the viewer in the middle of the picture.

    The scene counts for what a prompt can say: how the head is placed and turned is the picture's own affair. Whose
    picture it is, is not known to the reading of hats: strangers wear them, the same ones in every scene.
    """
    from pipeline.miniature.people import person
    from pipeline.miniature.scenes import BACKGROUNDS, HATS

    # a little small and low, so that the highest hat is in the picture
    plain = replace(scene, x=0.0, y=0.03, scale=0.95, tilt=0.0, turn=0.0)
    heads = [_drawn(somebody, plain) for somebody in people]
    hats = {
        name: [_hat(_drawn(person(number), replace(plain, hat=name))) for number in STRANGERS]
        for name in HATS
        if name != "none"
    }
    colours = np.concatenate([hat.colours for worn in hats.values() for hat in worn])
    return Answers(
        scene=scene,
        people=np.stack([head(drawing.pixels, drawing.landmarks) for drawing in heads]),
        hats=hats,
        contrast=float(colours.std(axis=0).mean()),
        backgrounds={name: backdrop(_drawn(people[0], replace(plain, background=name)).pixels) for name in BACKGROUNDS},
    )


def _drawn(somebody: "Person", scene: "Scene") -> "Drawing":
    from pipeline.miniature.world import draw

    return draw(somebody, scene, DRAWN)


def _hat(drawing: "Drawing") -> Hat:
    labels = np.repeat(np.where(drawing.labels == HAT, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    where = head(labels, drawing.landmarks)[..., 0] > 180  # well inside
    return Hat(where, head(drawing.pixels, drawing.landmarks)[where])


def head(rgb: Pixels, landmarks: ArrayLike) -> NDArray[np.float32]:
    """The head of a picture (H, W, 3), upright and at one size: (HEAD, HEAD, 3) float32, a little blurred.

    Blurred, as points that a detector found are a pixel or two off. Where the picture ends, its edge goes on.
    """
    matrix = similarity(landmarks, np.array(FFHQ_TEMPLATE) * HEAD_SHARE + HEAD_SHIFT) * (HEAD / FFHQ_SIZE)
    crop = cv2.warpAffine(rgb.astype(np.float32), matrix, (HEAD, HEAD), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.GaussianBlur(crop, (0, 0), 1.0), np.float32)


def backdrop(rgb: Pixels) -> NDArray[np.float32]:
    """What of a picture (H, W, 3) lies beside and above most heads and shoulders: (pixels, 3) float32, blurred."""
    small = cv2.resize(rgb, (BACKDROP, BACKDROP), interpolation=cv2.INTER_AREA)
    side, bottom = BACKDROP // 6, BACKDROP * 2 // 3
    edges = np.concatenate((small[:bottom, :side], small[:bottom, -side:]))
    return edges.reshape(-1, 3).astype(np.float32)
