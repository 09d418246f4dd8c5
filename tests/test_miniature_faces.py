import base64
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage import data

from pipeline.errors import NoFace
from pipeline.faces import FaceDetector, Faces, load_models
from pipeline.models.alignment import overlap
from pipeline.request import Person
from pipeline.settings import Settings

MODELS = load_models(Settings(preset="miniature"))
ASTRONAUT = data.astronaut()
FACE = (170, 60, 280, 175)  # where one sees it


def detect(photo: np.ndarray, face: str | int = "largest") -> Faces:
    detector = FaceDetector(lambda source, name: np.ascontiguousarray(photo), MODELS)
    return detector.detect(Person(photos=["AAAA"], face=face), 0)


@pytest.mark.parametrize("edge", [256, 512, 1024])
def test_the_face_of_a_real_photo_is_found(edge):
    """The astronaut's face is found at any size of the photo, with the eyes where they are."""
    photo = cv2.resize(ASTRONAUT, (edge, edge), interpolation=cv2.INTER_AREA)
    faces = detect(photo)
    scale = edge / 512
    assert overlap(faces.faces[0].box.box, np.array(FACE) * scale)[0] > 0.7
    np.testing.assert_allclose(faces.faces[0].landmarks[:2] / scale, [(203, 101), (246, 103)], atol=6)
    assert 0.5 <= faces.faces[0].box.score <= 1
    assert faces.trace.models == {"miniature-faces": "by rule"}


def test_a_photo_file_becomes_a_face():
    """From the bytes of scikit-image's own file, as a request carries them, to the face in it."""
    photo = base64.b64encode((Path(data.__file__).parent / "astronaut.png").read_bytes()).decode()
    faces = FaceDetector.load(Settings(preset="miniature")).detect(Person(photos=[photo]), 0)
    np.testing.assert_array_equal(faces.faces[0].features, detect(ASTRONAUT).faces[0].features)


def test_only_the_face_is_found():
    """Nothing else in the astronaut's photo is taken for a face."""
    assert len(MODELS.detector.find(ASTRONAUT)) == 1


def test_the_same_photo_gives_the_same_face():
    """Two runs agree in every bit."""
    one, other = (detect(ASTRONAUT).faces[0] for _ in range(2))
    np.testing.assert_array_equal(one.embedding, other.embedding)
    np.testing.assert_array_equal(one.features, other.features)
    assert one.box.box == other.box.box


def test_two_people_are_told_apart_by_place():
    """The astronaut beside the mirrored astronaut: left and right are two faces, and 0 and 1 the same two."""
    pair = np.concatenate([ASTRONAUT, ASTRONAUT[:, ::-1]], axis=1)
    left, right = (detect(pair, face).faces[0] for face in ("left", "right"))
    assert overlap(left.box.box, FACE)[0] > 0.6
    assert overlap(right.box.box, (1024 - FACE[2], FACE[1], 1024 - FACE[0], FACE[3]))[0] > 0.6
    assert detect(pair, 0).faces[0].box.box == left.box.box
    assert detect(pair, 1).faces[0].box.box == right.box.box


@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket", "coins", "camera", "page", "brick", "gravel", "moon"])
def test_other_things_are_no_faces(name):
    """A cat, a cup, a rocket and the like: no_face."""
    photo = getattr(data, name)()
    with pytest.raises(NoFace):
        detect(photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (1024, 3), (23, 23), (24, 24), (1024, 1024)])
def test_empty_photos_of_any_shape_have_no_face(shape):
    """A gray photo, however small or thin, is no_face and no failure."""
    with pytest.raises(NoFace):
        detect(np.full((*shape, 3), 128, np.uint8))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_is_not_upright_is_not_found(turns):
    """The stand-in knows upright faces alone; the message says so."""
    with pytest.raises(NoFace, match="upright"):
        detect(np.rot90(ASTRONAUT, turns))


def test_a_tiny_face_is_not_found():
    """A face far below a tenth of the photo's edge is no_face; the message says that it must not be small."""
    tiny = cv2.resize(ASTRONAUT, (128, 128), interpolation=cv2.INTER_AREA)
    with pytest.raises(NoFace, match="not small"):
        detect(cv2.copyMakeBorder(tiny, 300, 300, 300, 300, cv2.BORDER_CONSTANT, value=(90, 90, 90)))


def test_a_face_at_the_border_is_found():
    """A photo cut closely at one side of the face still shows it."""
    face = detect(ASTRONAUT[:, 165:]).faces[0]
    assert overlap(face.box.box, (FACE[0] - 165, FACE[1], FACE[2] - 165, FACE[3]))[0] > 0.6


def test_the_embedding_has_arcfaces_length_and_tells_crops_apart():
    """About 20 long; the same face, darker, is near; another picture is not; a blank crop is finite."""
    crop = cv2.resize(ASTRONAUT[60:180, 165:285], (112, 112))
    other = cv2.resize(data.chelsea(), (112, 112))
    one, darker, cat = (MODELS.recogniser.embed(x) for x in (crop, (crop * 0.6).astype(np.uint8), other))
    assert one.shape == (512,)
    assert one.dtype == np.float32
    assert np.linalg.norm(one) == pytest.approx(20, abs=0.01)
    assert one @ darker / 400 > 0.95
    assert one @ cat / 400 < 0.5
    assert np.isfinite(MODELS.recogniser.embed(np.full((112, 112, 3), 7, np.uint8))).all()


def test_labels_are_an_oval_with_hair_in_bisenets_numbers():
    """Skin at the template's five points, hair above, background in the corners."""
    labels = MODELS.parser.labels(np.zeros((512, 512, 3), np.uint8))
    assert set(np.unique(labels)) == {0, 1, 17}
    assert {labels[y, x] for x, y in ((193, 240), (319, 240), (257, 314), (201, 371), (313, 371))} == {1}
    assert labels[80, 256] == 17
    assert labels[0, 0] == labels[511, 511] == labels[300, 20] == 0
