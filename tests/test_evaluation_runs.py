"""What the evaluation says of pictures whose worth is known, and a whole run with untrained networks."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from pipeline.evaluation import people, run, sheet
from pipeline.evaluation.drawings import Drawings
from pipeline.evaluation.judges import Look, hair_colour, skin_colour
from pipeline.evaluation.painting import FULL, NOBODY, Format, Painter
from pipeline.flow import load_stages
from pipeline.miniature.people import person
from pipeline.miniature.scenes import read, scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import FFHQ_TEMPLATE, ffhq_crop, similarity
from pipeline.settings import Settings
from tests import untrained
from tests.face_models import red_squares

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


@pytest.fixture(scope="module")
def world():
    """People, cases, and judges to whom all photos are known."""
    subjects, cases = people.drawn(PEOPLE, seed=5)
    oracle = Oracle()
    for subject in subjects:
        number = int(subject.name.split()[1])
        plain, other = scene(2 * number, hat="none", light="soft", style="drawing"), scene(2 * number + 1, hat="none")
        assert people.pixels(subject.reference).tobytes() == oracle.draw(subject.person, plain).tobytes()
        assert people.pixels(subject.second).tobytes() == oracle.draw(subject.person, other).tobytes()
    return subjects, cases, oracle, run.Judges(oracle, people.pixels, comparer=Drawings(subjects))


def test_people_and_prompts_are_held_out_and_follow_the_seed():
    """Another seed is other people and prompts; every prompt names a combination that training never draws."""
    (one, cases), (again, _), (other, _) = people.drawn(2, 1), people.drawn(2, 1), people.drawn(2, 2)
    assert [s.reference for s in one] == [s.reference for s in again]
    assert not {s.name for s in one} & {s.name for s in other}
    assert all(case.scene.held_out for case in cases)
    for case in cases:
        named = read(case.prompt)
        assert named["background"] == case.scene.background
        assert all(getattr(case.scene, attribute) == name for attribute, name in named.items())


def test_drawings_of_the_right_people_are_near_perfect(world):
    """Who draws the right person in the right scene gets every likeness, every hat and every colour."""
    subjects, cases, oracle, judges = world
    found = run.evaluate(
        subjects, cases, (NOBODY, FULL), lambda subject, case, _: oracle.draw(subject.person, case.scene), judges
    ).figures
    for name in ("likeness_1", "top1", "faces_found_1"):
        assert found[name].value == pytest.approx(1)
    for name in ("pix1", "background_1", "hat_1"):
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
    assert abs(found["skin_correlation"].value) < 0.7


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


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """An untrained miniature, whose faces are red squares."""
    return untrained.write(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Two people: one with two photos, one with one."""
    folder = tmp_path_factory.mktemp("people")
    for name, corners in {"ann": ((64, 64), (96, 64)), "bob": ((64, 96),)}.items():
        (folder / name).mkdir()
        for index, corner in enumerate(corners):
            photo = people.png(red_squares((256, 256), corner))
            (folder / name / f"{index}.png").write_bytes(photo)
    return folder


def test_the_command_on_a_folder_of_people(miniature, album, tmp_path):
    """A table, plots, and a JSON whose figures have errors and name the files that they come from."""
    (tmp_path / "prompts.txt").write_text("# remark\nportrait of a person, in space\n")
    options = {
        "--miniature-dir": miniature,
        "--people-dir": album,
        "--prompts": tmp_path / "prompts.txt",
        "--json": tmp_path / "out" / "figures.json",
        "--plots": tmp_path / "plots",
        "--steps": 2,
        "--id-weights": "0.5",
        "--start-steps": "0,1",
    }
    told = CliRunner().invoke(app, ["evaluate", *(str(part) for pair in options.items() for part in pair)])
    assert told.exit_code == 0, told.output
    assert "| likeness to the reference photo |" in told.output
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    for name in ("likeness", "likeness_ref", "top1", "clip_t", "clip_i", "faces_found", "adherence", "copy_paste"):
        for condition in ("0", "0.5", "1", "start_1"):
            assert {f"{name}_{condition}", f"{name}_{condition}_se"} <= found.keys()
    assert {"random_pairs", "top1", "pix1", "skin_correlation", "hair_correlation"} <= found.keys()
    assert found["clip_i_0"] == pytest.approx(1)
    assert "judge/recogniser.onnx" in found["run"]["models"]
    assert len(list((tmp_path / "plots").iterdir())) == 2


def test_the_command_says_what_is_missing(tmp_path):
    """Real presets need real people; a folder without people, or a wrong list, is told in a line."""
    for options, told in (
        (["--preset", "flux-dev"], "--people-dir"),
        (["--people-dir", str(tmp_path)], "one folder per person"),
        (["--id-weights", "a,b"], "not a list of numbers"),
        (["--people-dir", str(tmp_path), "--prompts", str(tmp_path / "none.txt")], "none.txt"),
    ):
        outcome = CliRunner().invoke(app, ["evaluate", *options])
        assert outcome.exit_code == 1
        assert told in outcome.output


def test_the_sheets(miniature):
    """Every sheet is one picture, whose rows are the cases: people, mixed people, two people side by side."""
    square = people.png(red_squares((256, 256), (64, 64)))
    subjects = [people.Subject(name, square) for name in ("ann", "bob")]
    cases = [people.Case(index, "a person", index) for index in (0, 1)]
    painter = Painter(load_stages(Settings(miniature_dir=miniature)), Format(256, 256, num_steps=1))
    pair = [(subjects[0], subjects[1])]
    row = 256 + 2 * sheet.CAPTION + sheet.GAP
    for rgb, rows, tiles in (
        (sheet.people_sheet(painter, subjects, cases), 2, 4),
        (sheet.mixed_sheet(painter, pair, cases[:1]), 1, 6),
        (sheet.together_sheet(painter, pair, cases[:1]), 1, 3),
    ):
        assert rgb.shape[0] == rows * row
        assert rgb.shape[1] >= tiles * 256
