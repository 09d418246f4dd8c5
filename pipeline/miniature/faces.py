"""Stand-ins for the face networks, by rule and without weights, until the miniature's own are trained.

A cascade of local binary patterns that scikit-image ships (trained by OpenCV's authors) finds upright faces seen from
the front, at least about a tenth of the photo's long edge wide. The rest is geometry and a cosine transform: the
points are where they are on an average face, the embedding is the crop's own coarse structure, and the labels are an
oval with hair above it. So a photo of a person leads to a face of that person, but nobody is recognised by it.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.models.alignment import FFHQ_SIZE, overlap
from pipeline.models.detection import Candidate

MODELS = {"miniature-faces": "by rule"}
EDGES = (320, 256)  # long edges, in pixels, at which the cascade looks
WINDOW = 24  # the cascade's own window, and so its smallest face
SCALE_STEP = 1.1
SAME_FACE = 0.4  # overlap
# Windows that must agree. Measured on scikit-image's own pictures: faces 34 and more, other things up to 15.
AGREEMENT = 20
# as parts of the cascade's box, which goes from above the brows to the chin
AVERAGE_FACE = ((0.29, 0.36), (0.71, 0.36), (0.5, 0.58), (0.31, 0.75), (0.69, 0.75))
MOST_WINDOWS = 3000  # a crowd of forty; the work grows with the square
EMBEDDING_SIZE = 512
EMBEDDING_NORM = 20.0  # about that of ArcFace's raw output
SKIN, HAIR = 1, 17  # BiSeNet's numbers; 0 is background


class CascadeFinder:
    """Finds faces with scikit-image's cascade; a trained detector will take its place."""

    def __init__(self) -> None:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade

        self._cascade = Cascade(lbp_frontal_face_cascade_filename())

    def find(self, rgb: NDArray[np.uint8]) -> Sequence[Candidate]:
        """All faces of a photo (H, W, 3), the surest first; none: an empty sequence."""
        gray = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        boxes = np.concatenate([self._windows(gray, edge) for edge in EDGES])
        boxes = boxes[:MOST_WINDOWS]
        faces: list[Candidate] = []
        if not len(boxes):
            return faces
        same = np.stack([overlap(box, boxes) >= SAME_FACE for box in boxes])  # (n, n)
        while True:
            group = same[np.argmax(same.sum(axis=1))].copy()
            if group.sum() < AGREEMENT:
                return faces
            faces.append(_candidate(boxes[group]))
            same[group] = same[:, group] = False

    def _windows(self, gray: NDArray[np.uint8], edge: int) -> NDArray[np.float64]:
        scale = min(1.0, edge / max(gray.shape))
        height, width = (round(side * scale) for side in gray.shape)
        if min(height, width) < WINDOW:
            return np.empty((0, 4))
        small = cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)
        found = self._cascade.detect_multi_scale(
            small,
            scale_factor=SCALE_STEP,
            step_ratio=1,
            min_size=(WINDOW, WINDOW),
            max_size=(height, width),
            # Every single window, unmerged: scikit-image merges in the order in which its threads finish.
            min_neighbor_number=0,
            intersection_score_threshold=2.0,
        )
        boxes = sorted((w["c"], w["r"], w["c"] + w["width"], w["r"] + w["height"]) for w in found)
        return np.asarray(np.array(boxes, np.float64).reshape(-1, 4) / scale)


class CosineRecogniser:
    """A face's coarse structure as 512 numbers; a trained recogniser will take its place."""

    def embed(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        """An ArcFace crop (112, 112, 3) -> (512,): its lowest frequencies, at ArcFace's usual length."""
        gray = cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY).astype(np.float64)
        waves = cv2.dct(gray / 255)  # (112, 112); [0, 0] is the brightness
        rows, columns = np.indices(waves.shape)
        frequency = np.hypot(rows, columns).ravel()
        lowest = np.argsort(frequency, kind="stable")[1 : EMBEDDING_SIZE + 1]
        # natural pictures fall off with frequency; this gives each number about the same size
        numbers = (waves.ravel() * frequency)[lowest]
        length = np.linalg.norm(numbers)
        return np.asarray(numbers * (EMBEDDING_NORM / max(float(length), 1e-6)), np.float32)


class OvalParser:
    """An oval of skin with a band of hair above it; a trained parser will take its place."""

    def labels(self, aligned: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An FFHQ crop (H, W, 3) -> what each pixel is taken to show (H, W), in BiSeNet's numbers."""
        height, width = aligned.shape[:2]
        y, x = (axis / FFHQ_SIZE for axis in np.ogrid[:height, :width])
        skin = ((x - 0.5) / 0.26) ** 2 + ((y - 0.61) / 0.34) ** 2 <= 1
        head = ((x - 0.5) / 0.36) ** 2 + ((y - 0.5) / 0.47) ** 2 <= 1
        return np.where(skin, SKIN, np.where(head & (y < 0.5), HAIR, 0)).astype(np.uint8)


def _candidate(windows: NDArray[np.float64]) -> Candidate:
    box = windows.mean(axis=0)
    landmarks = box[:2] + np.array(AVERAGE_FACE) * (box[2:] - box[:2])
    score = len(windows) / (len(windows) + AGREEMENT)  # 0.5 where just enough windows agree
    return Candidate(box.astype(np.float32), score, landmarks.astype(np.float32))
