import numpy as np
import pytest

from pipeline.errors import FaceIndexOutOfRange, NoFace, PhotoUnreadable
from pipeline.face_models import FaceModels
from pipeline.faces import FaceDetector, Faces
from pipeline.models.alignment import arcface_crop, ffhq_crop
from pipeline.models.detection import Candidate, choose, same_face, usable
from pipeline.models.face_features import gray_on_white
from pipeline.request import Person
from tests.face_models import FACE, candidate

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (300, 400, 3), np.uint8)
LEFT, MIDDLE, RIGHT = candidate(10, 20, 90, 100), candidate(160, 110, 240, 190), candidate(280, 30, 400, 150)


class Found:
    """A detector that found these faces."""

    def __init__(self, *faces: Candidate) -> None:
        self.faces = faces

    def find(self, rgb):
        return self.faces


class Means:
    """A recogniser that tells crops apart by their mean colours, far from unit length."""

    def embed(self, crop):
        return np.resize(crop.mean(axis=(0, 1)), 512).astype(np.float32)


class Halves:
    """A parser that sees skin on the left and background on the right."""

    def labels(self, aligned):
        labels = np.zeros(aligned.shape[:2], np.uint8)
        labels[:, :256] = 1
        return labels


def detect(*faces: Candidate, aligner: Found | None = None, photos: int = 1, **person: object) -> Faces:
    models = FaceModels(Found(*faces), Means(), aligner, Halves(), {"scrfd.onnx": "00"})
    detector = FaceDetector(lambda photo, name: PHOTO, models)
    return detector.detect(Person(photos=["AAAA"] * photos, **person), 2)


@pytest.mark.parametrize(
    ("face", "expected"),
    [("largest", RIGHT), ("center", MIDDLE), ("left", LEFT), ("right", RIGHT), (0, LEFT), (1, MIDDLE), (2, RIGHT)],
)
def test_the_face_that_was_asked_for_is_used(face, expected):
    """`face` chooses by size, nearness to the photo's middle, or place from left to right, whatever was found first."""
    used = detect(RIGHT, LEFT, MIDDLE, face=face).faces[0]
    assert used.box.box == tuple(expected.box.tolist())
    np.testing.assert_array_equal(used.landmarks, expected.landmarks)


@pytest.mark.parametrize("face", ["largest", "center", "left", 0])
def test_of_two_equal_faces_the_leftmost_is_used(face):
    """Equal faces, equally far from the middle: the leftmost, in whichever order they were found."""
    one, other = candidate(100, 100, 160, 160), candidate(240, 100, 300, 160)
    for found in ((one, other), (other, one)):
        assert choose(found, face, (400, 300)) is one


def test_of_two_faces_one_above_the_other_the_upper_is_used():
    """Faces with the same middle from left to right: the upper one."""
    upper, lower = candidate(100, 10, 160, 70), candidate(100, 110, 160, 170)
    assert choose((lower, upper), "right", (400, 300)) is upper


def test_a_number_beyond_the_faces_is_refused_with_how_many_there_are():
    """The message names the field, the photo, and how many faces it has."""
    with pytest.raises(FaceIndexOutOfRange, match=r"people\[2\]\.face is 3, but people\[2\]\.photos\[0\] has 3 face"):
        detect(LEFT, MIDDLE, RIGHT, face=3)


def test_no_face_names_the_photo_and_says_what_helps():
    """A photo without a face is the caller's to mend."""
    with pytest.raises(NoFace, match=r"people\[2\]\.photos\[0\] shows no face; send one with .* upright"):
        detect()


def test_what_cannot_be_a_face_is_none():
    """Boxes beyond the photo or turned inside out, numbers that are not finite and points in one spot are not faces."""
    points = candidate(10, 10, 90, 90).landmarks
    wrong = [
        candidate(500, 10, 600, 100),
        Candidate(np.array([90, 90, 10, 10], np.float32), 0.9, points),
        Candidate(np.array([np.nan, 0, 9, 9], np.float32), 0.9, points),
        Candidate(LEFT.box, 0.9, np.full((5, 2), 40, np.float32)),
        Candidate(LEFT.box, 0.9, np.full((5, 2), np.inf, np.float32)),
    ]
    assert usable([*wrong, LEFT], (400, 300)) == [LEFT]
    with pytest.raises(NoFace):
        detect(*wrong)


def test_both_branches_use_the_picked_face():
    """Where the second detector prefers somebody else, embedding and features still are of the same face."""
    again = candidate(164, 114, 244, 194)
    used = detect(LEFT, MIDDLE, RIGHT, face="center", aligner=Found(RIGHT, again)).faces[0]
    np.testing.assert_array_equal(used.embedding, Means().embed(arcface_crop(PHOTO, MIDDLE.landmarks)))
    aligned = ffhq_crop(PHOTO, again.landmarks)
    np.testing.assert_array_equal(used.features, gray_on_white(aligned, Halves().labels(aligned)).numpy())


@pytest.mark.parametrize("aligner", [None, Found(), Found(LEFT, RIGHT)])
def test_without_a_match_the_detectors_own_points_align(aligner):
    """No second detector, nothing found by it, or only other people: the first detector's points are used."""
    used = detect(LEFT, MIDDLE, RIGHT, face="center", aligner=aligner).faces[0]
    aligned = ffhq_crop(PHOTO, MIDDLE.landmarks)
    np.testing.assert_array_equal(used.features, gray_on_white(aligned, Halves().labels(aligned)).numpy())


def test_a_match_overlaps_enough_and_most():
    """Of another detector's faces the best overlap counts, from 0.4 on."""
    near, nearer, far = candidate(180, 110, 260, 190), candidate(165, 110, 245, 190), candidate(210, 110, 290, 190)
    assert same_face(MIDDLE, [far, near, nearer]) is nearer
    assert same_face(MIDDLE, [far]) is None
    assert same_face(MIDDLE, []) is None


def test_features_are_gray_on_white():
    """Background is white, the rest gray, at EVA-CLIP's size, float32; the embedding keeps its length."""
    face = detect(MIDDLE).faces[0]
    assert face.features.shape == (336, 336)
    assert face.features.dtype == face.embedding.dtype == np.float32
    np.testing.assert_allclose(face.features[:, 172:], 1, atol=1e-5)
    assert face.features[:, :164].mean() < 0.7
    assert face.embedding.shape == (512,)
    assert np.linalg.norm(face.embedding) > 100


def test_a_face_at_the_border_is_used_and_its_box_ends_with_the_photo():
    """A face cut by the border is used; the reported box lies within the photo."""
    face = detect(candidate(-30, 250, 50, 330)).faces[0]
    assert face.box.box == (0, 250, 50, 300)
    assert np.isfinite(face.features).all()


def test_a_tiny_face_is_used():
    """A face of a few pixels is used as it is: the box says how small it was."""
    face = detect(candidate(200, 150, 206, 156)).faces[0]
    assert face.box.box == (200, 150, 206, 156)
    assert np.isfinite(face.features).all()


def test_a_face_on_its_head_is_turned_upright():
    """A photo turned by 180 degrees gives the features of the upright one."""
    upright = detect(MIDDLE).faces[0]
    corner = np.array([399, 299], np.float32)
    turned = Candidate(np.array([*corner - MIDDLE.box[2:], *corner - MIDDLE.box[:2]]), 0.9, corner - MIDDLE.landmarks)
    models = FaceModels(Found(turned), Means(), None, Halves(), {})
    detector = FaceDetector(lambda photo, name: np.ascontiguousarray(PHOTO[::-1, ::-1]), models)
    again = detector.detect(Person(photos=["AAAA"]), 0).faces[0]
    np.testing.assert_allclose(again.features, upright.features, atol=0.15)
    assert np.abs(again.features - upright.features).mean() < 0.01


def test_each_photo_gives_a_face_in_order():
    """Faces come in the photos' order, each with its photo's number; the trace tells time and files."""
    faces = detect(MIDDLE, photos=3)
    assert [face.box.photo for face in faces.faces] == [0, 1, 2]
    assert faces.faces[0].box.score == 0.9
    assert faces.trace.seconds["faces"] > 0
    assert faces.trace.models == {"scrfd.onnx": "00"}


def test_an_unreadable_photo_is_named():
    """The reader is told each photo's name, and its errors pass."""

    def read(photo, name):
        if photo.base64 == "BBBB":
            raise PhotoUnreadable(f"{name} is damaged")
        return PHOTO

    detector = FaceDetector(read, FaceModels(Found(LEFT), Means(), None, Halves(), {}))
    with pytest.raises(PhotoUnreadable, match=r"people\[1\]\.photos\[1\] is damaged"):
        detector.detect(Person(photos=["AAAA", "BBBB"]), 1)


def test_fake_points_are_as_the_networks_give_them():
    """The points of these tests are in the order of the templates: eyes, nose, mouth, from left to right."""
    assert (np.diff(FACE[[0, 2, 3]], axis=0)[:, 1] > 0).all()
    assert FACE[0, 0] < FACE[1, 0]
    assert FACE[3, 0] < FACE[4, 0]
