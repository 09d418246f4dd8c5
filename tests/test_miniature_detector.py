"""The miniature's face detector: what it learns from, its loss by hand, its file, and what the shipped one finds."""

import copy
import math
from pathlib import Path

import cv2
import insightface
import numpy as np
import onnxruntime
import pytest
import torch
from skimage import data

from pipeline.face_models import load_finder
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import held_out_scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import overlap
from pipeline.training.miniature import detector
from pipeline.training.miniature.detector_canvases import Canvases
from pipeline.training.miniature.detector_data import (
    LFW_BOX,
    LFW_POINTS,
    Placed,
    Portrait,
    Sources,
    inside,
    level,
    mirrored,
    place,
)
from pipeline.training.miniature.detector_network import BOLDER, POOLS, DetectorNetwork, read_onnx, write_onnx
from pipeline.training.miniature.detector_patches import mixed, turned
from pipeline.weights import SHIPPED

ASTRONAUT = data.astronaut()
FACE = np.array(detector.ASTRONAUT)
POINTS = np.array([[3, 4], [7, 4], [5, 6], [4, 8], [6, 8]], np.float32)


@pytest.fixture(scope="module")
def finder():
    return load_finder(SHIPPED / "antelopev2" / "scrfd_miniature.onnx")


@pytest.fixture
def portrait():
    gray = np.tile(np.arange(10, dtype=np.float32), (10, 1))
    return Portrait((gray, gray[::2, ::2]), np.array([1, 0, 9, 10], np.float32), POINTS, drawn=False)


def targets_of(edge: float, visible: float = 1.0, middle: float = 32.0) -> detector.Targets:
    half = edge / 2
    box = np.array([middle - half, middle - half, middle + half, middle + half], np.float32)
    return detector.targets([[Placed(box, np.full((5, 2), middle, np.float32), visible)]])


def test_a_face_is_asked_of_the_anchor_of_its_size():
    """A small face of the first, a large one of the second, one between of both; of none where it is out of range."""
    asked = {edge: (targets_of(edge).found == 1).any((2, 3))[0].tolist() for edge in (8, 18, 24, 40, 63)}
    assert asked == {8: [False] * 2, 18: [True, False], 24: [True] * 2, 40: [False, True], 63: [False] * 2}


def test_the_cells_around_a_faces_middle_say_where_it_is():
    """The cell at (32, 32) finds it, with distances in strides; the ring around may do as it likes; others must not."""
    wanted = targets_of(20)
    assert wanted.found[0, 0, 8, 8] == 1
    assert wanted.found[0, 0, 8, 9] == -1  # 4 of 20 pixels away
    assert wanted.found[0, 0, 8, 11] == 0
    assert wanted.boxes[0, 0, :, 8, 8].tolist() == [2.5] * 4
    assert wanted.points[0, 0, :, 8, 8].tolist() == [0] * 10


def test_a_hidden_face_is_no_face():
    """Half hidden, it may be found; all but hidden, it must not."""
    assert set(targets_of(20, visible=0.5).found.unique().tolist()) == {-1, 0}
    assert targets_of(20, visible=0.1).found.unique().tolist() == [0]


def test_a_face_between_cells_still_has_one():
    """The nearest cell finds a small face whose middle is as far from all cells as it can be."""
    assert (targets_of(15, middle=30.0).found == 1).sum() >= 1


def test_the_loss_by_hand():
    """One face, given 0.5: log 2; three of the cells without one count, given 0.5 as well; distances are right."""
    wanted = targets_of(17.0, middle=33.0)  # one cell alone is near
    assert (wanted.found == 1).sum() == 1
    logits = torch.zeros(1, 2, 1, detector.CELLS, detector.CELLS)
    loss = detector.detection_loss((logits, wanted.boxes, wanted.points), wanted)
    assert loss.item() == pytest.approx(4 * math.log(2), abs=1e-5)
    off = detector.detection_loss((logits, wanted.boxes + 2.5, wanted.points), wanted)  # as far as the box reaches
    assert off.item() - loss.item() == pytest.approx(4 * (1 - 0.05), abs=1e-5)


def test_a_picture_without_a_face_still_teaches():
    """No face in the whole batch: the loss is finite and pushes the most suspicious cells."""
    logits = torch.zeros(1, 2, 1, detector.CELLS, detector.CELLS, requires_grad=True)
    wanted = detector.targets([[]])
    detector.detection_loss((logits, wanted.boxes, wanted.points), wanted).backward()
    assert (logits.grad > 0).sum() == 3


def test_a_mirrored_portrait_keeps_left_on_the_left(portrait):
    """Its eyes and mouth change names with their sides; twice mirrored is the same."""
    turned = mirrored(portrait)
    assert turned.points[0, 0] < turned.points[1, 0]
    np.testing.assert_array_equal(mirrored(turned).points, portrait.points)
    np.testing.assert_array_equal(mirrored(turned).box, portrait.box)
    np.testing.assert_array_equal(turned.levels[0][0], np.arange(10)[::-1])


def test_a_tilted_face_has_its_ovals_box(portrait):
    """A quarter turn changes width and height; the points turn too."""
    placed = place(portrait, np.array([[0, -1, 20], [1, 0, 0]], np.float32))
    np.testing.assert_allclose(placed.box, [10, 1, 20, 9], atol=1e-5)
    np.testing.assert_allclose(placed.points[0], [16, 3], atol=1e-5)


def test_a_face_is_shrunk_from_the_nearest_larger_picture(portrait):
    """Half as large: from the halved picture, with box and points halved; never from one too small."""
    assert level(portrait, 6).levels[0].shape == (10, 10)
    halved = level(portrait, 2)
    assert halved.levels[0].shape == (5, 5)
    np.testing.assert_array_equal(halved.points, POINTS / 2)


def test_a_face_beyond_the_canvas_counts_by_what_is_inside():
    """Half beyond its border: half; all: nothing."""
    assert inside(np.array([-8, 10, 8, 30], np.float32)) == 0.5
    assert inside(np.array([70, 10, 80, 20], np.float32)) == 0


def test_a_turned_head_shows_its_nose_aside():
    """To the right for a positive angle, and more than the eyes; straight on, it is as it was."""
    gray = np.tile(np.arange(23, dtype=np.float32), (25, 1))
    head = Portrait((gray,), LFW_BOX, LFW_POINTS, drawn=False)
    np.testing.assert_allclose(turned(head, 0, 0).points, LFW_POINTS, atol=1e-5)
    np.testing.assert_allclose(turned(head, 0, 0).levels[0], gray, atol=1e-2)
    moved = (turned(head, 0.5, 0).points - LFW_POINTS)[:, 0]
    assert moved[2] > max(moved[0], moved[1]) > 0
    assert turned(head, 0.5, 0).levels[0][12, 11] < gray[12, 11]  # what was to the left of the middle is in it now


def test_a_mixed_face_lies_between_two(portrait):
    """A quarter of the way from one to the other, pixel by pixel."""
    other = Portrait((portrait.levels[0] + 8,), portrait.box, portrait.points, drawn=False)
    np.testing.assert_allclose(mixed(portrait, other, 0.25).levels[0], portrait.levels[0] + 2)


def test_the_hardest_canvases_are_those_that_look_most_like_a_face():
    """By the network's highest score in each; the network goes on training, its averages as they were."""
    torch.manual_seed(0)
    network = DetectorNetwork(stem=4, width=6, depth=1)
    empty = torch.randn(6, 1, 64, 64)
    with torch.no_grad():
        best = copy.deepcopy(network).eval()(empty)[0].amax((1, 2, 3, 4)).argmax()
    before = copy.deepcopy(network.state_dict())
    assert torch.equal(detector.hardest(network, empty, 1)[0], empty[best])
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_same_seed_draws_the_same_canvases(portrait):
    """Pictures and faces follow from the generator alone, and every value is a gray."""
    sources = Sources([portrait], [], [np.random.default_rng(0).uniform(0, 255, (80, 90)).astype(np.float32)], [POINTS])
    one, other = (Canvases(sources, np.random.default_rng(3)) for _ in range(2))
    for _ in range(20):
        (gray, faces), (again, faces_again) = one.draw(), other.draw()
        np.testing.assert_array_equal(gray, again)
        assert len(faces) == len(faces_again)
        assert gray.shape == (64, 64)
        assert 0 <= gray.min() <= gray.max() <= 255


def test_the_file_says_what_the_network_says(tmp_path):
    """For each stride: the network on the pooled gray photo, cell by cell, anchor by anchor.

    Scores, in 0..1, are those of the mean over the photo and its mirror image, where the latter has that cell.
    """
    torch.manual_seed(0)
    network = DetectorNetwork(stem=4, width=6, depth=1).train()
    network(torch.randn(8, 1, 32, 32))  # batch norms that do something
    write_onnx(network.eval(), tmp_path / "detector.onnx")
    photo = torch.rand(1, 3, 64, 96) * 2 - 1
    said = onnxruntime.InferenceSession(tmp_path / "detector.onnx").run(None, {"photo": photo.numpy()})
    gray = (photo * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    for number, pool in enumerate(POOLS):
        with torch.no_grad():
            pooled = torch.nn.functional.avg_pool2d(gray, pool)
            (logits, *distances), other = network(pooled), network(pooled.flip(3))[0]
        logits[..., 1:] = (logits[..., 1:] + other.flip(4)[..., :-1]) / 2
        for kind, expected in enumerate(((logits + BOLDER).sigmoid(), *distances)):
            rows = expected[0].permute(2, 3, 0, 1).flatten(0, 2)  # cells row by row, two anchors each
            np.testing.assert_allclose(said[kind * 3 + number], rows.numpy(), atol=1e-4)


def test_a_written_network_is_read_again(tmp_path):
    """It says the same, without normalisations of its own."""
    torch.manual_seed(0)
    network = DetectorNetwork(stem=4, width=6, depth=1).train()
    gray = torch.randn(8, 1, 32, 32)
    network(gray)
    write_onnx(network.eval(), tmp_path / "detector.onnx")
    with torch.no_grad():
        for said, expected in zip(read_onnx(tmp_path / "detector.onnx")(gray), network(gray), strict=True):
            torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


def test_a_short_training_writes_a_detector_that_insightface_reads(tmp_path):
    """Three steps: a small file with SCRFD's interface, and finite figures."""
    plan = detector.DetectorPlan(steps=3, more_steps=2, batch=4, people=5, examined=1)
    figures = detector.train(tmp_path, tmp_path, plan)
    assert figures["bytes"] < 2_000_000
    assert all(np.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("edge", [256, 512, 1024])
def test_the_face_of_a_real_photo_is_found(finder, edge):
    """The astronaut's face, and nothing else, at any size of the photo, with the eyes where they are."""
    (face,) = finder.find(cv2.resize(ASTRONAUT, (edge, edge), interpolation=cv2.INTER_AREA))
    scale = edge / 512
    assert overlap(face.box, FACE * scale)[0] > 0.7
    np.testing.assert_allclose(face.landmarks[:2] / scale, [(203, 101), (246, 103)], atol=6)
    assert face.score > 0.8


def test_six_people_in_one_photo_are_six_faces(finder):
    """insightface's sample picture; none of its faces was learnt from."""
    photo = cv2.imread(str(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"))
    found = finder.find(np.ascontiguousarray(photo[..., ::-1]))
    middles = sorted((face.box[:2] + face.box[2:]).tolist() for face in found)
    expected = [(115, 325), (317, 213), (512, 343), (790, 413), (945, 135), (1172, 335)]  # where one sees them
    np.testing.assert_allclose(np.array(middles) / 2, expected, atol=25)


def test_two_people_are_told_apart_by_place(finder):
    """The astronaut beside the mirrored astronaut: two faces."""
    found = sorted(finder.find(np.concatenate([ASTRONAUT, ASTRONAUT[:, ::-1]], axis=1)), key=lambda face: face.box[0])
    assert len(found) == 2
    assert overlap(found[0].box, FACE)[0] > 0.6
    assert overlap(found[1].box, (1024 - FACE[2], FACE[1], 1024 - FACE[0], FACE[3]))[0] > 0.6


def test_a_face_at_the_border_is_found(finder):
    """A photo cut closely at one side of the face still shows it."""
    (face,) = finder.find(ASTRONAUT[:, 165:])
    assert overlap(face.box, FACE - (165, 0, 165, 0))[0] > 0.6


@pytest.mark.parametrize("name", [*detector.OTHER_THINGS, "brick", "camera", "chelsea", "coins", "gravel", "page"])
def test_other_things_are_no_faces(finder, name):
    """A cup, a rocket, the moon: unseen; and a cat, coins and the like that it has learnt from."""
    assert finder.find(detector.picture(name)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (1024, 3), (23, 23), (24, 24), (1024, 1024)])
def test_empty_photos_of_any_shape_have_no_face(finder, shape):
    """A gray photo, however small or thin."""
    assert finder.find(np.full((*shape, 3), 128, np.uint8)) == []


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_is_not_upright_is_not_found(finder, turns):
    """It lies, or stands on its head."""
    assert finder.find(np.rot90(ASTRONAUT, turns)) == []


def test_a_tiny_face_is_not_found(finder):
    """A face of a thirtieth of the photo's edge."""
    tiny = cv2.resize(ASTRONAUT, (128, 128), interpolation=cv2.INTER_AREA)
    assert finder.find(cv2.copyMakeBorder(tiny, 300, 300, 300, 300, cv2.BORDER_CONSTANT, value=(90, 90, 90))) == []


@pytest.mark.parametrize("size", [128, 256, 640])
def test_drawn_people_are_found(finder, size):
    """Held-out people in held-out scenes, at any size, sharp or blurred: one face each, where it is."""
    for seed in range(FIRST_HELD_OUT, FIRST_HELD_OUT + 12):
        drawing = draw(person(seed), held_out_scene(seed), size)
        pixels = cv2.GaussianBlur(drawing.pixels, (0, 0), size / 200) if seed % 2 else drawing.pixels
        (face,) = finder.find(pixels)
        assert overlap(face.box, drawing.box)[0] > 0.7
        width = drawing.box[2] - drawing.box[0]
        np.testing.assert_allclose(face.landmarks, drawing.landmarks, atol=0.08 * width)


@pytest.mark.parametrize("count", [2, 3])
def test_drawn_people_side_by_side_are_found(finder, count):
    """As many faces as people, from left to right."""
    people = [draw(person(FIRST_HELD_OUT + seed), held_out_scene(seed)) for seed in range(count)]
    found = finder.find(np.concatenate([drawing.pixels for drawing in people], axis=1))
    assert len(found) == count
    for number, face in enumerate(sorted(found, key=lambda face: face.box[0])):
        assert overlap(face.box, people[number].box + (256 * number, 0, 256 * number, 0))[0] > 0.7
