"""The shipped miniature's FaceDetector as a whole; for its networks see test_miniature_{detector,networks}.py."""

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage import data

from pipeline.errors import NoFace
from pipeline.face_models import FaceModels, load_models
from pipeline.faces import FaceDetector, Faces
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import held_out_scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import overlap
from pipeline.request import Person
from pipeline.settings import Settings

ASTRONAUT = data.astronaut()
FACE = (170, 60, 280, 175)  # where one sees it


@pytest.fixture(scope="module")
def models() -> FaceModels:
    return load_models(Settings(device="cpu"))


@pytest.fixture(scope="module")
def detect(models):
    def detect(photo: np.ndarray, face: str | int = "largest") -> Faces:
        detector = FaceDetector(lambda source, name: np.ascontiguousarray(photo), models)
        return detector.detect(Person(photos=["AAAA"], face=face), 0)

    return detect


@pytest.mark.parametrize("edge", [256, 512, 1024])
def test_the_face_of_a_real_photo_is_found(detect, edge):
    """The astronaut's face is found at any size of the photo, with the eyes where they are."""
    faces = detect(cv2.resize(ASTRONAUT, (edge, edge), interpolation=cv2.INTER_AREA))
    scale = edge / 512
    assert overlap(faces.faces[0].box.box, np.array(FACE) * scale)[0] > 0.7
    np.testing.assert_allclose(faces.faces[0].landmarks[:2] / scale, [(203, 101), (246, 103)], atol=6)
    assert 0.5 <= faces.faces[0].box.score <= 1


def test_a_face_tells_the_files_that_made_it(detect, models):
    """Detector, recogniser and parser, each with its sha256; there is no second detector."""
    told = detect(ASTRONAUT).trace.models
    assert [name.split("/")[-1] for name in told] == [
        *("scrfd_miniature.onnx", "arcface_miniature.onnx", "parsing_bisenet_miniature.safetensors")
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in told.values())
    assert models.aligner is None


def test_a_photo_file_becomes_a_face(detect):
    """From the bytes of scikit-image's own file, as a request carries them, to the face in it."""
    photo = base64.b64encode((Path(data.__file__).parent / "astronaut.png").read_bytes()).decode()
    faces = FaceDetector.load(Settings(device="cpu")).detect(Person(photos=[photo]), 0)
    np.testing.assert_array_equal(faces.faces[0].features, detect(ASTRONAUT).faces[0].features)


def test_the_same_photo_gives_the_same_face(detect):
    """Two runs agree in every bit."""
    one, other = (detect(ASTRONAUT).faces[0] for _ in range(2))
    np.testing.assert_array_equal(one.embedding, other.embedding)
    np.testing.assert_array_equal(one.features, other.features)
    assert one.box.box == other.box.box


def test_two_people_are_told_apart_by_place(detect):
    """The astronaut beside the mirrored astronaut: left and right are two faces, and 0 and 1 the same two."""
    pair = np.concatenate([ASTRONAUT, ASTRONAUT[:, ::-1]], axis=1)
    left, right = (detect(pair, face).faces[0] for face in ("left", "right"))
    assert overlap(left.box.box, FACE)[0] > 0.6
    assert overlap(right.box.box, (1024 - FACE[2], FACE[1], 1024 - FACE[0], FACE[3]))[0] > 0.6
    assert detect(pair, 0).faces[0].box.box == left.box.box
    assert detect(pair, 1).faces[0].box.box == right.box.box


@pytest.mark.parametrize("name", ["coffee", "rocket", "moon"])
def test_other_things_are_no_faces(detect, name):
    """Things that the detector has not learnt from are no_face; test_miniature_detector.py looks at more of them."""
    photo = getattr(data, name)()
    with pytest.raises(NoFace):
        detect(photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (1024, 3), (23, 23), (24, 24), (1024, 1024)])
def test_empty_photos_of_any_shape_have_no_face(detect, shape):
    """A gray photo, however small or thin, is no_face and no failure."""
    with pytest.raises(NoFace):
        detect(np.full((*shape, 3), 128, np.uint8))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_is_not_upright_is_not_found(detect, turns):
    """The miniature knows upright faces alone; the message says so."""
    with pytest.raises(NoFace, match="upright"):
        detect(np.rot90(ASTRONAUT, turns))


def test_a_tiny_face_is_not_found(detect):
    """A face of a thirtieth of the photo's edge is no_face; the message says that it must not be small."""
    tiny = cv2.resize(ASTRONAUT, (128, 128), interpolation=cv2.INTER_AREA)
    with pytest.raises(NoFace, match="not small"):
        detect(cv2.copyMakeBorder(tiny, 300, 300, 300, 300, cv2.BORDER_CONSTANT, value=(90, 90, 90)))


def test_a_face_at_the_border_is_found(detect):
    """A photo cut closely at one side of the face still shows it."""
    face = detect(ASTRONAUT[:, 165:]).faces[0]
    assert overlap(face.box.box, (FACE[0] - 165, FACE[1], FACE[2] - 165, FACE[3]))[0] > 0.6


def test_drawn_people_are_found_and_told_apart(detect):
    """People and scenes that nobody learnt from: each face where it was drawn, and nearest to the same person's."""
    drawings = [
        [draw(person(FIRST_HELD_OUT + who), held_out_scene(10 * who + number)) for number in range(2)]
        for who in range(12)
    ]
    units = []
    for drawing in (drawing for pair in drawings for drawing in pair):
        face = detect(drawing.pixels).faces[0]
        assert overlap(face.box.box, drawing.box)[0] > 0.5
        units.append(face.embedding / np.linalg.norm(face.embedding))
    cosines = np.stack(units) @ np.stack(units).T - 2 * np.eye(24)
    assert (cosines.argmax(axis=1) == np.arange(24) ^ 1).mean() >= 0.9
    assert cosines[np.arange(24), np.arange(24) ^ 1].mean() > 0.5


def test_what_is_no_face_is_white(detect):
    """The features show a drawn face in gray on white: white in the corners below, not in the middle."""
    features = detect(draw(person(FIRST_HELD_OUT), held_out_scene(0)).pixels).faces[0].features
    assert features.shape == (336, 336)
    assert features[-20:, :20].mean() > 0.95
    assert features[160:200, 150:190].mean() < 0.95
