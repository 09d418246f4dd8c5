"""The evaluation itself: paint every case under every condition, look at the pictures, and sum up.

Pictures are judged one case at a time and not kept: a folder of people with real prompts would not fit in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FaceError, NoFace, PictureInvalid
from pipeline.evaluation.judges import Look
from pipeline.evaluation.metrics import Figure, averaged, copy_paste, correlation, cosine, cosines, luminance, mean
from pipeline.evaluation.painting import FULL, NOBODY, Condition
from pipeline.evaluation.people import Case, Subject
from pipeline.faces import Pixels

Paint = Callable[[Subject, Case, Condition], Pixels]
Progress = Callable[[str], None]  # told a line about every finished case
UNKNOWN = np.full(3, np.nan)
# Measured under every condition; these are also reported without a suffix, and then mean an id_weight of 1.
HEADLINES = ("random_pairs", "top1", "pix1", "skin_correlation", "hair_correlation")


class Eye(Protocol):
    """Looks at faces (judges.FaceJudge)."""

    def look(self, rgb: Pixels) -> Look | None:
        """The largest face of a picture; None where there is none."""


class Reader(Protocol):
    """Tells prompts followed from prompts ignored (judges.Clip)."""

    def picture(self, rgb: Pixels) -> NDArray[np.float32]:
        """A picture as a vector (d,)."""

    def prompt(self, text: str) -> NDArray[np.float32]:
        """A prompt as a vector (d,) of the same space."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read off a picture of the drawn world by comparing pixels: 1 right, 0 wrong, NaN not looked at.

    pix1: the right one of all people is the nearest; background and hat: as the prompt says.
    """

    pix1: float = np.nan
    background: float = np.nan
    hat: float = np.nan


class Comparer(Protocol):
    """Reads a picture by comparing it with drawings (drawings.Drawings)."""

    def read(self, case: Case, rgb: Pixels, landmarks: NDArray[np.float32] | None) -> Reading:
        """What a picture shows; landmarks: None where no face was found."""


@dataclass(frozen=True, slots=True, eq=False)
class Judges:
    """Everybody who judges; clip and comparer may be absent."""

    eye: Eye
    photo: Callable[[bytes], Pixels]
    clip: Reader | None = None
    comparer: Comparer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One picture under one condition. Without a face: look is None, and likeness counts as 0.

    hat_asked: the prompt asks for a hat.
    """

    subject: int
    look: Look | None
    clip_t: float
    clip_i: float
    reading: Reading
    hat_asked: bool


@dataclass(frozen=True, slots=True, eq=False)
class Photos:
    """What the judge saw in a subject's photos: None where it found no face, or where there is no second photo."""

    reference: Look | None
    second: Look | None


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """The figures by name, and the same for each condition apart; ceiling: those of the truth, where it is known.

    counts: top1_of and pix1_of, the people among whom the right one is looked for; references_missed and
    photos_unusable, reference and second photos in which no face was found.
    """

    figures: Mapping[str, Figure]
    by_condition: Mapping[Condition, Mapping[str, Figure]]
    ceiling: Mapping[str, Figure] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


def evaluate(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    conditions: Sequence[Condition],
    paint: Paint,
    judges: Judges,
    progress: Progress = lambda _: None,
) -> Results:
    """All figures of these cases under these conditions; CLIP-I needs NOBODY among them.

    Whoever is not found in their reference photo gets no pictures, as from the service; a picture that was not made, or
    came out as nothing (PictureInvalid), scores as one without a face. Raises NoFace where nobody at all is found, and
    what else `paint` raises.
    """
    photos = [_photos(subject, judges) for subject in subjects]
    if all(photo.reference is None for photo in photos):
        raise NoFace("no face is found in anybody's reference photo; take other photos.")
    scores: dict[Condition, list[Score]] = {condition: [] for condition in conditions}
    for number, case in enumerate(cases):
        subject = subjects[case.subject]
        pictures: dict[Condition, Pixels | None] = dict.fromkeys(conditions)
        if photos[case.subject].reference is not None:
            pictures = {condition: _painted(paint, subject, case, condition) for condition in conditions}
        for condition, score in _scored(case, pictures, judges).items():
            scores[condition].append(score)
        progress(f"{number + 1} of {len(cases)}: {subject.name}: {case.prompt}")
    by_condition = {condition: summary(found, photos) for condition, found in scores.items()}
    figures = {
        f"{name}_{condition.name}": figure
        for condition, found in by_condition.items()
        for name, figure in found.items()
    }
    figures |= {name: by_condition[FULL][name] for name in HEADLINES if FULL in by_condition}
    return Results(figures, by_condition, counts=_counts(subjects, photos))


def _counts(subjects: Sequence[Subject], photos: Sequence[Photos]) -> dict[str, int]:
    seen = sum(photo.second is not None for photo in photos)
    return {
        "top1_of": seen,
        "pix1_of": sum(subject.person is not None for subject in subjects),
        "references_missed": sum(photo.reference is None for photo in photos),
        "photos_unusable": sum(subject.second is not None for subject in subjects) - seen,
    }


def _photos(subject: Subject, judges: Judges) -> Photos:
    reference = judges.eye.look(judges.photo(subject.reference))
    second = None if subject.second is None else judges.eye.look(judges.photo(subject.second))
    return Photos(reference, second)


def _painted(paint: Paint, subject: Subject, case: Case, condition: Condition) -> Pixels | None:
    try:
        return paint(subject, case, condition)
    except (PictureInvalid, FaceError):
        return None


def _scored(case: Case, pictures: Mapping[Condition, Pixels | None], judges: Judges) -> dict[Condition, Score]:
    seen = {
        condition: None if judges.clip is None or rgb is None else judges.clip.picture(rgb)
        for condition, rgb in pictures.items()
    }
    words = None if judges.clip is None else judges.clip.prompt(case.prompt)
    scores = {}
    for condition, rgb in pictures.items():
        look = None if rgb is None else judges.eye.look(rgb)
        reading = Reading() if judges.comparer is None else Reading(0.0, 0.0, 0.0)
        if judges.comparer is not None and rgb is not None:
            reading = judges.comparer.read(case, rgb, None if look is None else look.landmarks)
        vector, bare = seen[condition], seen.get(NOBODY)
        scores[condition] = Score(
            subject=case.subject,
            look=look,
            clip_t=np.nan if vector is None or words is None else cosine(vector, words),
            clip_i=np.nan if vector is None or bare is None else cosine(vector, bare),
            reading=reading,
            hat_asked=case.scene is not None and case.scene.hat != "none",
        )
    return scores


def summary(scores: Sequence[Score], photos: Sequence[Photos]) -> dict[str, Figure]:
    """The figures of one condition.

    likeness: cosine, by the judge, between the picture's face and the second photo; 0 where no face is found.
    likeness_ref: the same with the reference photo (the paper's Face Sim). random_pairs: the mean cosine with other
    people's second photos. top1: the second photo nearest to the picture, of all people's, is the right one; a picture
    without a face is wrong, and among fewer than two people neither top1 nor pix1 means anything. copy_paste: see
    metrics. adherence: the mean of background and hat; both: the two together; hat_worn: the hat, where one is asked
    for. Standard errors are over people.
    """
    groups = [score.subject for score in scores]
    background, hat, pix1 = (
        np.array([getattr(score.reading, name) for score in scores]) for name in ("background", "hat", "pix1")
    )
    values = {
        "faces_found": [score.look is not None for score in scores],
        **_likenesses(scores, photos),
        "clip_t": [score.clip_t for score in scores],
        "clip_i": [score.clip_i for score in scores],
        "pix1": pix1 if len(photos) > 1 else np.full(len(scores), np.nan),
        "background": background,
        "hat": hat,
        "hat_worn": np.where([score.hat_asked for score in scores], hat, np.nan),
        "adherence": (background + hat) / 2,
        "both": background * hat,
    }
    return {name: mean(each, groups) for name, each in values.items()} | _colours(scores, photos)


def _likenesses(scores: Sequence[Score], photos: Sequence[Photos]) -> dict[str, list[float]]:
    known = [index for index, photo in enumerate(photos) if photo.second is not None]
    seconds = np.array([photo.second.embedding for photo in photos if photo.second is not None])  # (m, d)
    names = ("likeness", "likeness_ref", "copy_paste", "random_pairs", "top1")
    found: dict[str, list[float]] = {name: [] for name in names}
    for score in scores:
        values = dict.fromkeys(names, np.nan)
        photo = photos[score.subject]
        if score.look is None or photo.reference is None:
            values |= {"likeness_ref": 0.0}
            values |= {"likeness": 0.0, "top1": 0.0} if photo.second is not None else {}
        else:
            face = score.look.embedding
            values["likeness_ref"] = cosine(face, photo.reference.embedding)
            if photo.second is not None:
                near = cosines(face[None], seconds)[0]  # (m,)
                own = known.index(score.subject)
                values["likeness"], values["top1"] = float(near[own]), float(np.argmax(near) == own)
                values["copy_paste"] = copy_paste(face, photo.second.embedding, photo.reference.embedding)
                values["random_pairs"] = float(np.delete(near, own).mean()) if len(near) > 1 else np.nan
        if len(known) < 2:
            values["top1"] = np.nan
        for name, value in values.items():
            found[name].append(value)
    return found


def _colours(scores: Sequence[Score], photos: Sequence[Photos]) -> dict[str, Figure]:
    """Correlations, over people, of the colours of skin and hair in pictures and reference; and how often hair is lost.

    A person's pictures are one observation: their mean colour. hair_lost: of people whose hair shows in the reference,
    the share of pictures with a face and hardly any hair.
    """
    groups = [score.subject for score in scores]
    people = np.unique(groups)
    found = {}
    for part in ("skin", "hair"):
        drawn = np.array([_colour(score.look, part) for score in scores])  # (n, 3)
        true = np.array([_colour(photos[person].reference, part) for person in people])  # (people, 3)
        each = averaged(drawn, groups)  # (people, 3)
        found[f"{part}_correlation"] = correlation(luminance(each), luminance(true))
        for channel, name in enumerate(("red", "green", "blue")):
            found[f"{part}_{name}_correlation"] = correlation(each[:, channel], true[:, channel])
    hairy = {person for person, colour in zip(people, true, strict=True) if np.isfinite(colour).all()}
    lost = [
        float(np.isnan(score.look.hair).any()) if score.look is not None and score.subject in hairy else np.nan
        for score in scores
    ]
    return {**found, "hair_lost": mean(lost, groups)}


def _colour(look: Look | None, part: str) -> NDArray[np.float64]:
    colour: NDArray[np.float64] = UNKNOWN if look is None else getattr(look, part)
    return colour
