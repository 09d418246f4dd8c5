import cv2
import numpy as np
import pytest
from insightface.utils import face_align
from skimage.transform import SimilarityTransform

from pipeline.models import alignment
from pipeline.models.alignment import ARCFACE_TEMPLATE, FFHQ_TEMPLATE, similarity

TRANSFORMS = [similarity, alignment.robust_similarity]


def moved(points: object, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return scale * np.asarray(points) @ rotation.T + shift


def carry(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("template", [ARCFACE_TEMPLATE, FFHQ_TEMPLATE])
@pytest.mark.parametrize("degrees", [0, 25, 90, 180])
@pytest.mark.parametrize("scale", [0.05, 1, 3])
def test_a_face_however_turned_and_sized_lands_on_the_template(transform, template, degrees, scale):
    """Points that are the template turned, scaled and shifted come back onto it within a pixel."""
    points = moved(template, degrees, scale, (700, -40))
    np.testing.assert_allclose(carry(transform(points, template), points), template, atol=0.5)


def test_one_wrong_point_does_not_move_the_other_four():
    """The crop for the parser ignores a single point far off."""
    points = moved(FFHQ_TEMPLATE, 10, 0.4, (50, 60))
    points[2] += 90
    landed = carry(alignment.robust_similarity(points, FFHQ_TEMPLATE), points)
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(landed[others], np.array(FFHQ_TEMPLATE)[others], atol=1)


def test_least_squares_are_those_of_insightface():
    """Points that fit no similarity exactly give the transform of Umeyama's method, as insightface has it."""
    points = moved(ARCFACE_TEMPLATE, 15, 2, (30, 20)) + np.random.default_rng(0).normal(0, 3, (5, 2))
    theirs = SimilarityTransform.from_estimate(points, np.array(ARCFACE_TEMPLATE)).params[:2]
    np.testing.assert_allclose(similarity(points, ARCFACE_TEMPLATE), theirs, atol=1e-9)


def test_arcface_points_are_those_of_insightface():
    """The template of the recogniser's crop is the one it was trained with."""
    np.testing.assert_array_equal(np.array(ARCFACE_TEMPLATE, np.float32), face_align.arcface_dst)


def test_beyond_the_photo_the_crop_is_gray_as_in_the_official_code():
    """A face at the border is completed with facexlib's gray, (135, 133, 132) in BGR order."""
    white = np.full((100, 100, 3), 255, np.uint8)
    crop = alignment.ffhq_crop(white, np.array(FFHQ_TEMPLATE) - (300, 300))
    assert crop.shape == (512, 512, 3)
    assert crop[0, 0].tolist() == [132, 133, 135]
    assert crop[350, 350].tolist() == [255, 255, 255]


def test_a_photo_on_its_head_gives_the_upright_crop():
    """The points turn the crop: a photo and the same photo turned by 180 degrees give one picture."""
    photo = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8), (0, 0), 5)
    points = moved(FFHQ_TEMPLATE, 0, 0.4, (50, 30))
    upright = alignment.ffhq_crop(photo, points).astype(int)
    turned = alignment.ffhq_crop(np.ascontiguousarray(photo[::-1, ::-1]), 299 - points)
    assert np.abs(upright - turned).max() <= 2


def test_overlap_is_intersection_over_union():
    """The same box 1, half of it shared 1/3, none 0; an empty or inverted box overlaps with nothing."""
    others = [[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [1, 1, 1, 1], [2, 2, 0, 0]]
    np.testing.assert_allclose(alignment.overlap([0, 0, 2, 2], others), [1, 1 / 3, 0, 0, 0])
