"""The evaluation's eyes: a face judge (likeness, colours) and CLIP (prompt, and likeness of whole pictures).

The recogniser that judges is a network of its own, used neither for conditioning nor in a loss: a picture that merely
fools the recogniser it was trained against does not fool this one. The face is found as the service finds it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import WeightsMissing
from pipeline.face_models import FaceModels, Finder, Parser, Recogniser, load_recogniser
from pipeline.faces import Pixels
from pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

HAIR = 17  # BiSeNet's number
# Between eyes, nose and corners of the mouth, in FFHQ's 512 x 512 crop (left, top, right, bottom): cheeks beneath any
# glasses and above any beard.
CHEEKS = ((176, 292, 208, 324), (304, 292, 336, 324))
LEAST_HAIR = 0.015  # share of the FFHQ crop from which the hair's colour can be told
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """A face as the judge sees it.

    embedding (512,) float32; landmarks (5, 2) float32 in the picture's pixels; skin and hair: RGB (3,) float64, 0..255,
    NaN where too little of it shows.
    """

    embedding: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    skin: NDArray[np.float64]
    hair: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class FaceJudge:
    """Finds the largest face of a picture with the service's detector, and tells who it is and its colours."""

    finder: Finder
    recogniser: Recogniser
    parser: Parser

    @classmethod
    def load(cls, models: FaceModels, judge: Path, device: str = "cpu") -> Self:
        """`judge`: an ONNX recogniser in ArcFace's interface (112 x 112 in, one vector out).

        Raises WeightsMissing, WeightsCorrupt.
        """
        if not judge.is_file():
            raise WeightsMissing(f"{judge} is missing: the recogniser that judges; name it with --judge.")
        return cls(models.detector, load_recogniser(judge, device), models.parser)

    def look(self, rgb: Pixels) -> Look | None:
        """The largest face of a picture (H, W, 3); None where none is found."""
        from pipeline.models.alignment import arcface_crop, ffhq_crop
        from pipeline.models.detection import choose, usable

        size = (rgb.shape[1], rgb.shape[0])
        found = usable(self.finder.find(rgb), size)
        face = choose(found, "largest", size) if found else None
        if face is None:
            return None
        aligned = ffhq_crop(rgb, face.landmarks)  # (512, 512, 3)
        return Look(
            embedding=self.recogniser.embed(arcface_crop(rgb, face.landmarks)),
            landmarks=face.landmarks,
            skin=skin_colour(aligned),
            hair=hair_colour(aligned, self.parser.labels(aligned)),
        )


def skin_colour(aligned: Pixels) -> NDArray[np.float64]:
    """The median RGB (3,) of the cheeks of an FFHQ crop (512, 512, 3); no network is asked where they are."""
    patches = [aligned[top:bottom, left:right].reshape(-1, 3) for left, top, right, bottom in CHEEKS]
    return np.asarray(np.median(np.concatenate(patches), axis=0), np.float64)


def hair_colour(aligned: Pixels, labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The median RGB (3,) of what the parser calls hair in an FFHQ crop; NaN where hardly any shows.

    aligned (512, 512, 3); labels (512, 512) in BiSeNet's numbering. Bald people and hats leave too little.
    """
    hair = labels == HAIR
    if hair.mean() < LEAST_HAIR:
        return np.full(3, np.nan)
    return np.asarray(np.median(aligned[hair], axis=0), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A CLIP model that reads prompts and pictures into one space."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, settings: Settings) -> Self:
        """A transformers folder of a whole CLIPModel, both towers. Raises WeightsMissing, WeightsCorrupt."""
        from pipeline import checkpoints

        tokenizer, model = checkpoints.load_whole_clip(folder, settings)
        return cls(model, tokenizer)

    def picture(self, rgb: Pixels) -> NDArray[np.float32]:
        """A picture (H, W, 3) -> (d,), as OpenAI's processor prepares it: short side to size, centre cut out."""
        import torch
        from torch.nn.functional import interpolate

        size = int(self.model.config.vision_config.image_size)
        pixels = torch.from_numpy(np.array(rgb)).to(self.model.device).permute(2, 0, 1).float()[None] / 255
        scale = size / min(rgb.shape[:2])
        shape = [max(size, round(edge * scale)) for edge in rgb.shape[:2]]
        pixels = interpolate(pixels, size=shape, mode="bicubic", antialias=True).clamp(0, 1)  # (1, 3, H', W')
        top, left = ((edge - size) // 2 for edge in shape)
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (OPENAI_MEAN, OPENAI_STD))
        cut = (pixels[..., top : top + size, left : left + size] - mean) / std
        with torch.inference_mode():
            return _vector(self.model.get_image_features(pixel_values=cut.to(self.model.dtype)))

    def prompt(self, text: str) -> NDArray[np.float32]:
        """A prompt -> (d,)."""
        import torch

        from pipeline.text import CLIP_LENGTH, pieces

        ids = torch.tensor([pieces(self.tokenizer, text, CLIP_LENGTH)[0]], device=self.model.device)  # (1, 77)
        with torch.inference_mode():
            return _vector(self.model.get_text_features(input_ids=ids))


def _vector(features: "Tensor | Any") -> NDArray[np.float32]:
    # transformers 5 answers with the tower's output, in which the projected vector is the pooled one
    tensor = getattr(features, "pooler_output", features)
    vector: NDArray[np.float32] = tensor[0].float().cpu().numpy()
    return vector
