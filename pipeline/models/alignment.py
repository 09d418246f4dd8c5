"""Geometry of faces: five points -> the crops that ArcFace and the face parser expect.

Five points, as seen in the picture: left eye, right eye, nose, left and right corner of the mouth; (5, 2), x before y.
A face that lies or stands on its head is turned upright by them.
"""

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

# insightface, utils/face_align.py: the points in ArcFace's 112 x 112 crop
ARCFACE_SIZE = 112
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
# facexlib, utils/face_restoration_helper.py: the points in FFHQ's 512 x 512 crop
FFHQ_SIZE = 512
FFHQ_TEMPLATE = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
FFHQ_BORDER = (132, 133, 135)  # facexlib's (135, 133, 132) is in BGR order


def similarity(points: ArrayLike, template: ArrayLike) -> NDArray[np.float64]:
    """The turn, scale and shift (2, 3) that brings points (n, 2) nearest to template (n, 2), by least squares.

    The same as Umeyama's method, which insightface takes from scikit-image: in the plane it is one complex division.
    """
    source, target = (np.asarray(p, np.float64) @ (1, 1j) for p in (points, template))
    centred = source - source.mean()
    turn = np.vdot(centred, target - target.mean()) / np.vdot(centred, centred).real
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def robust_similarity(points: ArrayLike, template: ArrayLike) -> NDArray[np.float64]:
    """Like `similarity`, but a single point far off is ignored (least median of squares), as facexlib aligns."""
    source, target = (np.asarray(p, np.float64) for p in (points, template))
    matrix, _ = cv2.estimateAffinePartial2D(source, target, method=cv2.LMEDS)
    return similarity(source, target) if matrix is None else np.asarray(matrix, np.float64)


def arcface_crop(rgb: NDArray[np.uint8], points: ArrayLike) -> NDArray[np.uint8]:
    """The face as ArcFace wants it: (112, 112, 3) uint8, black beyond the photo."""
    matrix = similarity(points, ARCFACE_TEMPLATE)
    return np.asarray(cv2.warpAffine(rgb, matrix, (ARCFACE_SIZE, ARCFACE_SIZE), borderValue=0.0), np.uint8)


def ffhq_crop(rgb: NDArray[np.uint8], points: ArrayLike) -> NDArray[np.uint8]:
    """The face as the parser and EVA-CLIP want it: (512, 512, 3) uint8, gray beyond the photo."""
    matrix = robust_similarity(points, FFHQ_TEMPLATE)
    crop = cv2.warpAffine(rgb, matrix, (FFHQ_SIZE, FFHQ_SIZE), borderMode=cv2.BORDER_CONSTANT, borderValue=FFHQ_BORDER)
    return np.asarray(crop, np.uint8)


def area(boxes: ArrayLike) -> NDArray[np.float64]:
    """Areas (n,) of boxes (n, 4) as left, top, right, bottom; 0 for one turned inside out."""
    left, top, right, bottom = np.asarray(boxes, np.float64).reshape(-1, 4).T
    return np.maximum(right - left, 0) * np.maximum(bottom - top, 0)


def overlap(box: ArrayLike, boxes: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union (n,) of a box (4,) with boxes (n, 4)."""
    one, many = np.asarray(box, np.float64), np.asarray(boxes, np.float64).reshape(-1, 4)
    common = area(np.hstack((np.maximum(one[:2], many[:, :2]), np.minimum(one[2:], many[:, 2:]))))
    union = area(one) + area(many) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
