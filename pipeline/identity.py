"""IdentityEncoder: the Faces of one person -> Identity (EVA-CLIP + IDFormer, fusion)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.caches import Cache, digest, people_cache, read_only, revision
from pipeline.errors import InternalError
from pipeline.faces import FaceBox, Faces
from pipeline.settings import Settings
from pipeline.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.eva_clip import EvaClip
    from pipeline.models.pulid import IDFormer


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """Who somebody is, for FLUX.

    tokens (32 * k, 2048) float32: k is 1, or the number of photos with fusion "concat". boxes: the faces it came from.
    """

    tokens: NDArray[np.float32]
    boxes: tuple[FaceBox, ...]
    trace: Trace


class IdentityEncoder:
    """Turns faces into identity tokens; `cache` keeps the tokens (32 * k, 2048)."""

    def __init__(
        self,
        eva_clip: "EvaClip",
        idformer: "IDFormer",
        models: Mapping[str, str],
        cache: Cache[NDArray[np.float32]] | None = None,
    ) -> None:
        """Without a cache nothing is kept."""
        self._eva_clip = eva_clip
        self._idformer = idformer
        self._models = dict(models)
        self._revision = revision(models)
        self.cache = Cache(0, _bytes) if cache is None else cache

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Read the networks from the preset's files; raises WeightsError."""
        from pipeline import checkpoints

        files = checkpoints.files(settings)
        eva_clip, idformer = checkpoints.load_eva_clip(files, settings), checkpoints.load_idformer(files, settings)
        return cls(eva_clip, idformer, files.hashes("eva_clip", "pulid"), people_cache(settings.cache, _bytes))

    def encode(self, faces: Faces, fusion: str = "mean", tenant: str = "") -> Identity:
        """The identity of one person; `fusion` is mean (tokens averaged) or concat (tokens side by side).

        Of faces that the tenant has sent before the networks see nothing.

        People never share a pass through the networks: in one batch with others the last bits of the tokens, and so the
        pixels of the picture, would depend on who else is being served. Raises InternalError where the numbers are not
        finite.
        """
        started = time.perf_counter()
        embeddings = np.stack([face.embedding for face in faces.faces])  # (photos, 512)
        features = np.stack([face.features for face in faces.faces])  # (photos, 336, 336)
        key = (tenant, digest(self._revision, fusion, embeddings, features))
        tokens = self.cache.get_or_compute(key, lambda: self._fused(embeddings, features, fusion))
        trace = faces.trace + Trace({"identity": time.perf_counter() - started}, self._models)
        return Identity(tokens, tuple(face.box for face in faces.faces), trace)

    def _fused(
        self, embeddings: NDArray[np.float32], features: NDArray[np.float32], fusion: str
    ) -> NDArray[np.float32]:
        tokens = self._tokens(embeddings, features)  # (photos, 32, 2048)
        fused = tokens.mean(axis=0) if fusion == "mean" else tokens.reshape(-1, tokens.shape[-1])
        if not np.isfinite(fused).all():
            raise InternalError("The identity encoder gave numbers that are not finite; set PULID_DTYPE to bfloat16.")
        return read_only(fused)

    def _tokens(self, embeddings: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        from pipeline.models.face_features import normalise

        weight = self._idformer.proj_out
        with torch.inference_mode():
            arcface = torch.tensor(embeddings, device=weight.device, dtype=weight.dtype)  # (photos, 512)
            images = normalise(torch.tensor(features, device=weight.device)).to(weight.dtype)
            pooled, hidden = self._eva_clip(images)
            tokens: NDArray[np.float32] = self._idformer(id_cond(arcface, pooled), hidden).float().cpu().numpy()
        return tokens


def _bytes(tokens: NDArray[np.float32]) -> int:
    return tokens.nbytes


def id_cond(arcface: "Tensor", pooled: "Tensor") -> "Tensor":
    """IDFormer's id vector: ArcFace (B, 512) as it is beside EVA-CLIP's pooled (B, 768) at unit length -> (B, 1280).

    Source: official pipeline_flux.py, get_id_embedding.
    """
    import torch

    return torch.cat((arcface, pooled / pooled.norm(dim=1, keepdim=True)), dim=-1)
