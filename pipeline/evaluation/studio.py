"""What an evaluation works with, from a preset's files: the painter, the judges, the autoencoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import numpy as np

from pipeline.errors import SettingsInvalid
from pipeline.evaluation.drawings import Drawings
from pipeline.evaluation.judges import Clip, FaceJudge
from pipeline.evaluation.metrics import Figure, mean, psnr
from pipeline.evaluation.painting import FULL, Condition, Format, Painter, photo
from pipeline.evaluation.people import Case, Subject
from pipeline.evaluation.run import Judges, Results, evaluate
from pipeline.faces import Pixels
from pipeline.settings import Settings

LIBRARIES = ("torch", "diffusers", "transformers", "timm", "onnxruntime-gpu", "onnxruntime", "insightface", "numpy")


@dataclass(frozen=True, slots=True)
class JudgeFiles:
    """Where the judges' own networks are: an ONNX recogniser, and a folder of CLIP; None: without CLIP."""

    judge: Path
    clip: Path | None

    @classmethod
    def of(cls, settings: Settings, judge: Path | None = None, clip: Path | None = None) -> Self:
        """As given; the miniature brings its own along. Raises WeightsError, and SettingsInvalid without a judge."""
        from pipeline import checkpoints

        if settings.preset == "miniature":
            own = checkpoints.files(settings)
            return cls(judge or own.path("judge"), clip or own.path("clip"))
        if judge is None:
            raise SettingsInvalid(
                f"the preset {settings.preset} has no recogniser to judge by: name one with --judge, as ONNX in "
                "ArcFace's interface, that is neither the conditioning nor the training one (CurricularFace, say)."
            )
        return cls(judge, clip)


def load(settings: Settings, form: Format, files: JudgeFiles, drawn: Sequence[Subject] = ()) -> tuple[Painter, Judges]:
    """All stages of the service in this process, and the judges; raises WeightsError, SettingsInvalid.

    drawn: the people of the drawn world that pictures are compared with; none for real people.
    """
    from pipeline import checkpoints
    from pipeline.face_models import load_models
    from pipeline.flow import load_stages
    from pipeline.photos import PhotoReader

    # the judges first: what they lack is told before gigabytes are read
    faces = load_models(settings)
    eye = FaceJudge.load(faces, files.judge, str(checkpoints.device(settings)))
    clip = None if files.clip is None else Clip.load(files.clip, settings)
    comparer = Drawings(drawn) if drawn else None
    judges = Judges(eye, photo_reader(PhotoReader(settings).read), clip, comparer)
    return Painter(load_stages(settings, faces), form), judges


def photo_reader(read: Callable[..., Pixels]) -> Callable[[bytes], Pixels]:
    """The bytes of a photo -> its pixels, upright and no larger than the service reads them."""
    return lambda data: read(photo(data), "photo")


@dataclass
class Mirror:
    """The drawings that cases ask for, through the autoencoder and back: what a perfect denoiser would draw.

    ratios: the PSNR in dB of each drawing so far.
    """

    settings: Settings

    def __post_init__(self) -> None:
        from pipeline import checkpoints

        self._vae = checkpoints.load_vae(checkpoints.files(self.settings), self.settings)
        self.ratios: list[float] = []

    def paint(self, subject: Subject, case: Case, condition: Condition) -> Pixels:  # noqa: ARG002
        """The subject in the case's scene, as the autoencoder gives it back; drawn people only."""
        from pipeline.miniature.world import draw

        assert subject.person is not None
        assert case.scene is not None
        true = draw(subject.person, case.scene).pixels
        again = self.through(true)
        self.ratios.append(psnr(true, again))
        return again

    def through(self, rgb: Pixels) -> Pixels:
        """A picture (H, W, 3), encoded (the distribution's middle) and decoded."""
        import torch

        with torch.inference_mode():
            rows = torch.from_numpy(np.array(rgb)).to(self._vae.device, self._vae.dtype) / 127.5 - 1
            latents = self._vae.encode(rows.permute(2, 0, 1)[None]).latent_dist.mode()
            image = self._vae.decode(latents, return_dict=False)[0][0].float().clamp(-1, 1)  # (3, H, W)
        return np.asarray((127.5 * (image + 1)).byte().permute(1, 2, 0).cpu().numpy(), np.uint8)

    def quality(self) -> Figure:
        """The mean PSNR in dB over whole pictures."""
        return mean(self.ratios)


def with_ceiling(
    results: Results, settings: Settings, subjects: Sequence[Subject], cases: Sequence[Case], judges: Judges
) -> Results:
    """Results and, as `<name>_ceiling`, what the true drawings score after the autoencoder; and vae_psnr.

    No denoiser can be expected to do better than its autoencoder does with the truth.
    """
    mirror = Mirror(settings)
    found = evaluate(subjects, cases, (FULL,), mirror.paint, judges).by_condition[FULL]
    figures = {f"{name}_ceiling": figure for name, figure in found.items()}
    figures |= {**results.figures, "vae_psnr": mirror.quality()}
    return replace(results, figures=figures, ceiling=found)


def versions() -> dict[str, str]:
    """The versions of the libraries that compute, by name."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # one of the two builds of onnxruntime is never there
            continue
    return found


def judged_with(files: JudgeFiles) -> dict[str, str]:
    """The sha256 of the judges' files, by name."""
    from pipeline.download import sha256

    paths = [files.judge, *(sorted(files.clip.glob("*.safetensors")) if files.clip is not None else [])]
    return {f"{path.parent.name}/{path.name}": sha256(path) for path in paths}
