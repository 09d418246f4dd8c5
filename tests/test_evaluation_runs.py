"""What the evaluation says of pictures whose worth is known."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline.errors import NoFace
from pipeline.evaluation import people, run
from pipeline.evaluation.drawings import Drawings
from pipeline.evaluation.judges import Look, hair_colour, skin_colour
from pipeline.evaluation.painting import FULL, NOBODY
from pipeline.miniature.people import person
from pipeline.miniature.scenes import read, scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import FFHQ_TEMPLATE, ffhq_crop, similarity

PEOPLE = 12


class Oracle:
    """A judge that knows every drawing it is shown: who is on it, where the face is, and what each pixel is."""

    def __init__(self):
        self._known = {}

    def draw(self, somebody, wanted):
        drawing = draw(somebody, wanted)
        self._known[drawing.pixels.tobytes()] = (somebody, drawing)
        return drawing.pixels

    def look(self, rgb):
        if rgb.tobytes() not in self._known:
            return None
        somebody, drawing = self._known[rgb.tobytes()]
        labels = cv2.warpAffine(
            drawing.labels, similarity(drawing.landmarks, FFHQ_TEMPLATE), (512, 512), flags=cv2.INTER_NEAREST
        )
        aligned = ffhq_crop(drawing.pixels, drawing.landmarks)
        embedding = somebody.vector - np.mean([person(number).vector for number in range(20)], axis=0)
        return Look(embedding, drawing.landmarks, skin_colour(aligned), hair_colour(aligned, labels))


def acquainted(count, seed):
    """People, cases, and an oracle to whom all photos are known."""
    subjects, cases = people.drawn(count, seed)
    oracle = Oracle()
    for subject in subjects:
        number = int(subject.name.split()[1])
        plain, other = scene(2 * number, hat="none", light="soft", style="drawing"), scene(2 * number + 1, hat="none")
        assert people.pixels(subject.reference).tobytes() == oracle.draw(subject.person, plain).tobytes()
        assert people.pixels(subject.second).tobytes() == oracle.draw(subject.person, other).tobytes()
    return subjects, cases, oracle


@pytest.fixture(scope="module")
def world():
    """People, cases, an oracle to whom all photos are known, and judges that also compare pixels."""
    subjects, cases, oracle = acquainted(PEOPLE, seed=5)
    return subjects, cases, oracle, run.Judges(oracle, people.pixels, comparer=Drawings(subjects))


def test_people_and_prompts_are_held_out_and_follow_the_seed():
    """Another seed is other people and prompts; every prompt names a combination that training never draws."""
    (one, cases), (again, _), (other, others) = people.drawn(2, 1), people.drawn(2, 1), people.drawn(2, 2)
    assert [s.reference for s in one] == [s.reference for s in again]
    assert not {s.name for s in one} & {s.name for s in other}
    assert not {c.prompt for c in cases} & {c.prompt for c in others}
    assert all(case.scene.held_out for case in cases)
    for case in cases:
        named = read(case.prompt)
        assert len(named) == 6
        assert all(getattr(case.scene, attribute) == name for attribute, name in named.items())


def test_drawings_of_the_right_people_are_near_perfect(world):
    """Who draws the right person in the right scene gets every likeness, every hat and every colour."""
    subjects, cases, oracle, judges = world
    found = run.evaluate(
        subjects, cases, (NOBODY, FULL), lambda subject, case, _: oracle.draw(subject.person, case.scene), judges
    ).figures
    for name in ("likeness_1", "top1", "faces_found_1"):
        assert found[name].value == pytest.approx(1)
    for name in ("pix1", "background_1", "hat_1", "hat_worn_1"):
        assert found[name].value >= 0.9, name
    assert found["skin_correlation"].value > 0.9
    assert found["hair_correlation"].value > 0.85
    assert abs(found["random_pairs"].value) < 0.2


def test_drawings_of_wrong_people_are_near_chance(world):
    """Who draws strangers in other scenes gets nothing: the evaluation can fail."""
    subjects, cases, oracle, judges = world

    def paint(subject, case, condition):
        wrong = replace(case.scene, background="space" if case.scene.background != "space" else "snow", hat="top hat")
        return oracle.draw(person(cases.index(case) + 100), wrong)

    found = run.evaluate(subjects, cases, (FULL,), paint, judges).figures
    assert found["likeness_1"].value < 0.3
    for name in ("top1", "pix1"):
        assert found[name].value < 0.4, name
    assert found["background_1"].value == 0
    assert found["hat_1"].value == np.mean([case.scene.hat == "top hat" for case in cases])


def test_colours_of_wrong_people_do_not_correlate():
    """The skin of strangers has nothing to do with that of the references."""
    subjects, cases, oracle = acquainted(40, seed=6)
    found = run.evaluate(
        subjects,
        cases,
        (FULL,),
        lambda _, case, __: oracle.draw(person(cases.index(case) + 100), case.scene),
        run.Judges(oracle, people.pixels),
    ).figures
    assert found["skin_correlation"].count == 40
    assert abs(found["skin_correlation"].value) < 0.4
    assert abs(found["hair_correlation"].value) < 0.6  # of the third whom neither hat nor baldness leaves without hair


def test_more_pictures_of_a_person_are_no_more_people(world):
    """Every picture twice leaves each figure, its error and its number of people as they were."""
    subjects, cases, oracle, _ = world

    def paint(subject, case, condition):
        return oracle.draw(subject.person, replace(case.scene, hat="none"))

    judges = run.Judges(oracle, people.pixels)
    once, twice = (run.evaluate(subjects, many, (FULL,), paint, judges).figures for many in (cases, [*cases, *cases]))
    assert once["skin_correlation"].count == PEOPLE
    for name, one in once.items():
        two = twice[name]
        assert (two.value, two.error, two.count) == pytest.approx((one.value, one.error, one.count), nan_ok=True), name


def test_hats_that_are_asked_for_are_told_apart(world):
    """Who never draws a hat is right whenever none is asked for, and wrong whenever one is."""
    subjects, cases, oracle, judges = world
    found = run.evaluate(
        subjects,
        cases,
        (FULL,),
        lambda subject, case, _: oracle.draw(subject.person, replace(case.scene, hat="none")),
        judges,
    ).figures
    asked = sum(case.scene.hat != "none" for case in cases)
    assert 0 < asked < PEOPLE
    assert (found["hat_worn_1"].value, found["hat_worn_1"].count) == (0, asked)
    assert found["hat_1"].value == pytest.approx(1 - asked / PEOPLE)


def test_a_missed_reference_does_not_end_the_run(world):
    """Whoever is not found scores as faceless and is counted; only if nobody is found is there no evaluation."""
    subjects, cases, oracle, judges = world
    blank = people.png(np.zeros((256, 256, 3), np.uint8))
    some = [
        replace(subjects[0], reference=blank),
        replace(subjects[1], second=blank),
        *subjects[2:],
    ]
    results = run.evaluate(
        some, cases, (FULL,), lambda subject, case, _: oracle.draw(subject.person, case.scene), judges
    )
    assert results.counts == {
        "top1_of": PEOPLE - 1,
        "pix1_of": PEOPLE,
        "references_missed": 1,
        "photos_unusable": 1,
    }
    found = results.figures
    assert found["faces_found_1"].value == pytest.approx(1 - 1 / PEOPLE)
    assert (found["likeness_1"].value, found["likeness_1"].count) == (pytest.approx(1 - 1 / (PEOPLE - 1)), PEOPLE - 1)
    assert found["top1"].value == pytest.approx(1 - 1 / (PEOPLE - 1))
    assert found["skin_correlation"].count == PEOPLE - 1

    def refuse(*_):
        raise NoFace("the painter sees none either")

    assert run.evaluate(subjects, cases, (FULL,), refuse, judges).figures["pix1"].value == 0
    with pytest.raises(NoFace, match="anybody"):
        run.evaluate([replace(s, reference=blank) for s in subjects], cases, (FULL,), refuse, judges)


def test_one_person_is_not_told_from_others(world):
    """Among fewer than two people the right one is no achievement: top1 and pix1 are not measured."""
    subjects, cases, oracle, _ = world
    one = subjects[:1]
    judges = run.Judges(oracle, people.pixels, comparer=Drawings(one))
    found = run.evaluate(
        one, cases[:1], (FULL,), lambda subject, case, _: oracle.draw(subject.person, case.scene), judges
    ).figures
    assert np.isnan([found["top1"].value, found["pix1"].value]).all()
    assert found["likeness_1"].value == pytest.approx(1)


def test_blurred_drawings_are_still_read(world):
    """Hats and backgrounds are told apart on soft pictures with a cast and misplaced points, as networks give them."""
    subjects, cases, _, judges = world
    random = np.random.default_rng(0)
    right = []
    for case in cases:
        drawing = draw(subjects[case.subject].person, case.scene)
        soft = cv2.GaussianBlur(drawing.pixels, (0, 0), 3) + random.normal(0, 6, (1, 1, 3))
        points = drawing.landmarks + random.normal(0, 1, (5, 2)).astype(np.float32)
        reading = judges.comparer.read(case, np.clip(soft, 0, 255).astype(np.uint8), points)
        right.append((reading.background, reading.hat))
    assert np.mean(right, axis=0).min() >= 0.9


def test_a_picture_without_a_face_counts_as_zero(world):
    """It is nobody's likeness, nobody's drawing, and leaves no colours to correlate."""
    subjects, cases, _, judges = world
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    found = run.evaluate(subjects, cases, (FULL,), lambda *_: noise, judges).figures
    for name in ("likeness_1", "likeness_ref_1", "top1", "pix1", "hat_1", "faces_found_1"):
        assert found[name].value == 0, name
    assert np.isnan(found["skin_correlation"].value)
    assert np.isnan(found["copy_paste_1"].value)


def test_skin_and_hair_colours_are_the_persons(world):
    """Read off a plain drawing, skin is near the person's own, and so is hair; the bald have none."""
    subjects, _, oracle, _ = world
    for subject in subjects:
        look = oracle.look(people.pixels(subject.reference))
        assert np.abs(look.skin - subject.person.skin).max() < 35
        if subject.person.hair_style == "bald":
            assert np.isnan(look.hair).all()
        elif np.isfinite(look.hair).all():
            assert np.abs(look.hair - subject.person.hair).mean() < 35
