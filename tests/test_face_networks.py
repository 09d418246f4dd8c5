"""The real networks' classes, loaded from files in the real formats with weights by rule."""

import shutil

import numpy as np
import pytest
import torch
from facexlib.utils import img2tensor
from insightface.model_zoo.scrfd import SCRFD
from torchvision.transforms.functional import normalize

from pipeline.errors import WeightsCorrupt
from pipeline.face_models import load_recogniser, read_models
from pipeline.faces import FaceDetector
from pipeline.miniature.files import place
from pipeline.models import detection
from pipeline.models.alignment import arcface_crop, ffhq_crop
from pipeline.models.detection import BiSeNetParser, RetinaFaceFinder, ScrfdFinder, build_bisenet
from pipeline.models.face_features import gray_on_white
from pipeline.models.sizes import MINIATURE
from pipeline.request import Person
from pipeline.settings import Settings
from pipeline.weights import locate
from tests.face_models import FACE, RED, bisenet_weights, red_squares, retinaface_weights, write_arcface, write_scrfd

ROLES = ("detector", "recogniser", "retinaface", "parsing")


class Files:
    """Model files in a folder, one per role."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, role):
        return self.folder / role

    def has(self, role):
        return self.path(role).exists()

    def hashes(self, *roles):
        return dict.fromkeys(roles, "unverified")

    def mend(self, path):
        return f"mend {path.name}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_scrfd(folder / "detector")
    write_arcface(folder / "recogniser")
    torch.save(retinaface_weights(score=0.99, edge=48), folder / "retinaface")
    torch.save(bisenet_weights(label=1), folder / "parsing")
    return Files(folder)


@pytest.fixture(scope="module")
def models(files):
    return read_models(files, 64, "cpu")


class Recorder:
    """A detection network that answers only at one size, and remembers what it was given."""

    def __init__(self, answers_at):
        self.answers_at, self.sizes, self.images = answers_at, [], []

    def detect(self, img, input_size, det_thresh):
        assert det_thresh == 0.5
        self.sizes.append(input_size)
        self.images.append(img)
        found = int(input_size[0] == self.answers_at)
        return np.ones((found, 5), np.float32), np.ones((found, 5, 2), np.float32)


def test_sizes_are_tried_from_640_down_until_a_face_is_found():
    """640, 576, 512, 448, 384, 320: the first that finds a face ends the search."""
    late, never = Recorder(448), Recorder(0)
    photo = np.zeros((64, 48, 3), np.uint8)
    assert len(ScrfdFinder(late).find(photo)) == 1
    assert late.sizes == [(640, 640), (576, 576), (512, 512), (448, 448)]
    assert ScrfdFinder(never).find(photo) == []
    assert never.sizes == [(s, s) for s in (640, 576, 512, 448, 384, 320)]


def test_a_photo_too_thin_to_be_scaled_has_no_face():
    """A photo of 1 x 1000 would be less than a pixel wide for the network: not an error, no face."""
    network = Recorder(640)
    assert ScrfdFinder(network).find(np.zeros((1000, 1, 3), np.uint8)) == []
    assert network.sizes == []


def test_the_detector_is_given_bgr():
    """Photos are RGB, insightface wants BGR."""
    network = Recorder(640)
    ScrfdFinder(network).find(np.full((4, 4, 3), RED, np.uint8))
    assert network.images[0][0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("largest", [640, 448, 320])
def test_real_scrfd_is_run_at_each_size(tmp_path, largest):
    """insightface's own class really runs at the smaller sizes, and gives boxes in the photo's pixels."""
    network = SCRFD(model_file=str(write_scrfd(tmp_path / "scrfd.onnx", largest)))
    # letter-boxed from 640 x 320: scaled by largest / 640
    found = ScrfdFinder(network).find(red_squares((640, 320), (320, 128), edge=128))
    assert network.resolution_session_input_sizes[0] == (largest, largest)
    assert found
    edge = 96 * 640 / largest
    for face in found:
        assert face.score > 0.5
        left, top, right, bottom = face.box
        np.testing.assert_allclose((right - left, bottom - top), edge, rtol=1e-3)
        np.testing.assert_allclose(face.landmarks, face.box[:2] + FACE * edge, atol=0.1)
        assert 320 - edge <= (left + right) / 2 <= 448
        assert 128 - edge <= (top + bottom) / 2 <= 256


def test_real_scrfd_finds_nothing_where_there_is_nothing(models):
    """A blue photo has no face at any size."""
    assert models.detector.find(red_squares((320, 320))) == []


def test_the_embedding_is_the_networks_raw_output(models):
    """ArcFace's input is RGB scaled to -1..1, and its output is handed on as it is, not normalised."""
    crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    means = crop.reshape(16, 7, 16, 7, 3).mean(axis=(1, 3)).transpose(2, 0, 1).reshape(-1) / 127.5 - 1
    embedding = models.recogniser.embed(crop)
    assert embedding.shape == (512,)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, means[:512], atol=1e-5)


def test_retinaface_gives_boxes_and_points_in_the_photos_pixels(models):
    """facexlib's class from a file in DataParallel's names: boxes of 48 pixels with the rule's points."""
    found = models.aligner.find(red_squares((192, 160)))
    assert found
    for face in found:
        np.testing.assert_allclose(face.box[2:] - face.box[:2], 48, rtol=1e-3)
        np.testing.assert_allclose(face.landmarks, face.box[:2] + (FACE * (1, -1) + (0, 1)) * 48, atol=0.1)
        assert face.score == pytest.approx(0.99, abs=1e-4)


def test_retinaface_is_as_strict_as_the_official_code(files):
    """A face of score 0.96 is none: the threshold is 0.97."""
    network = detection.build_retinaface("cpu").eval()
    weights = retinaface_weights(score=0.96, edge=96)
    network.load_state_dict({name.removeprefix("module."): weight for name, weight in weights.items()})
    assert len(RetinaFaceFinder(network).find(red_squares((96, 96)))) == 0


def test_parsing_is_that_of_the_official_code():
    """Labels of a BiSeNet with random weights equal those of the official steps: img2tensor, normalise, argmax."""
    torch.manual_seed(0)
    network = build_bisenet().eval()
    aligned = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels = img2tensor(aligned[..., ::-1], bgr2rgb=True).unsqueeze(0) / 255
    with torch.no_grad():
        scores = network(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[0]
    labels = BiSeNetParser(network).labels(aligned)
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, scores.argmax(dim=1)[0].numpy())


def test_the_real_networks_together(models):
    """From a photo to a Face through all four networks: the picked face in both branches, aligned by RetinaFace."""
    photo = red_squares((320, 320), (64, 64), (224, 64), edge=64)
    detector = FaceDetector(lambda photo_, name: photo, models)
    faces = detector.detect(Person(photos=["AAAA"], face="right"), 0)
    face = faces.faces[0]
    left, top, right, bottom = face.box.box
    assert 224 <= (left + right) / 2 <= 288
    np.testing.assert_array_equal(face.embedding, models.recogniser.embed(arcface_crop(photo, face.landmarks)))
    again = detection.same_face(
        detection.Candidate(np.array(face.box.box), 1, face.landmarks), models.aligner.find(photo)
    )
    assert again is not None
    assert np.abs(again.landmarks - face.landmarks).max() > 10
    aligned = ffhq_crop(photo, again.landmarks)
    np.testing.assert_array_equal(face.features, gray_on_white(aligned, np.ones((512, 512))).numpy())
    assert faces.trace.models == dict.fromkeys(ROLES, "unverified")


def test_a_preset_without_retinaface_has_no_aligner(files, tmp_path):
    """Then the detector's own points align the face, and the trace names the three files that there are."""
    others = [role for role in ROLES if role != "retinaface"]
    for role in others:
        (tmp_path / role).symlink_to(files.path(role))
    models = read_models(Files(tmp_path), 64, "cpu")
    assert models.aligner is None
    assert models.files == dict.fromkeys(others, "unverified")
    photo = red_squares((320, 320), (64, 64))
    face = FaceDetector(lambda photo_, name: photo, models).detect(Person(photos=["AAAA"]), 0).faces[0]
    aligned = ffhq_crop(photo, face.landmarks)
    np.testing.assert_array_equal(face.features, gray_on_white(aligned, np.ones((512, 512))).numpy())


def test_a_slim_parser_in_safetensors(untrained):
    """A parser of a quarter of the channels loads from safetensors; a file of another width is refused."""
    files = locate(Settings(miniature_dir=untrained))
    labels = read_models(files, MINIATURE.bisenet_width, "cpu").parser.labels(np.zeros((64, 64, 3), np.uint8))
    assert (labels == 1).all()
    with pytest.raises(WeightsCorrupt, match=r"parsing_bisenet_miniature\.safetensors "):
        read_models(files, 64, "cpu")


def test_a_damaged_safetensors_parser_is_named(untrained, tmp_path):
    """A cut-off file is WeightsCorrupt and names the file; of what is shipped nothing is to be fetched."""
    whole = place(untrained, "parsing").read_bytes()
    shutil.copytree(untrained, tmp_path / "miniature")
    (tmp_path / "miniature" / "manifest.json").unlink()
    place(tmp_path / "miniature", "parsing").write_bytes(whole[: len(whole) // 2])
    files = locate(Settings(miniature_dir=tmp_path / "miniature"))
    with pytest.raises(WeightsCorrupt, match=r"parsing_bisenet_miniature\.safetensors .*; install this package anew"):
        read_models(files, MINIATURE.bisenet_width, "cpu")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("content", [b"", b"not a model", "half", "another"])
def test_a_damaged_file_is_named(files, tmp_path, role, content):
    """An empty, foreign or cut-off file, or another model's, is WeightsCorrupt, names the file and says what to do."""
    for other in ROLES:
        (tmp_path / other).symlink_to(files.path(other))
    whole = files.path(role).read_bytes()
    partner = {"detector": "recogniser", "recogniser": "detector", "retinaface": "parsing", "parsing": "retinaface"}
    (tmp_path / role).unlink()
    texts = {"half": whole[: len(whole) // 2], "another": files.path(partner[role]).read_bytes()}
    (tmp_path / role).write_bytes(texts.get(content, content))
    with pytest.raises(WeightsCorrupt, match=rf"{role} .*; mend {role}\.$"):
        read_models(Files(tmp_path), 64, "cpu")


def test_a_damaged_file_of_no_preset(tmp_path):
    """Whoever named it is told to name another one."""
    (tmp_path / "judge.onnx").write_bytes(b"not a model")
    with pytest.raises(WeightsCorrupt, match=r"judge\.onnx .*; name another file\.$"):
        load_recogniser(tmp_path / "judge.onnx")
