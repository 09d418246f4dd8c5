"""JSONL and pictures -> prepared examples on disk, and those as what a training reads.

A row is `{"image": path, "prompt": text, "person": name}`; without a person the picture is nobody else's, and its own
face is its reference. A folder of prepared examples holds shards of tensors, the prompts of the losses, and
`index.json`, which says what was prepared, how, and why rows were left out.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from pipeline.errors import InvalidRequest, PhotoUnreadable, SettingsInvalid, WeightsMissing
from pipeline.faces import Face, FaceDetector
from pipeline.request import Person, Photo
from pipeline.tensors import write_tensors
from pipeline.training.config import Frozen, TrainingConfig
from pipeline.training.crop import face_crops
from pipeline.training.examples import Batch, Prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from pipeline.photos import PhotoReader
    from pipeline.text import TextEncoder

INDEX, PROMPTS = "index.json", "prompts.safetensors"
TARGET = ("latents", "text", "pooled", "token_weights")
REFERENCE = ("embedding", "features", "reference")


class Row(Frozen):
    """One line of the input."""

    image: str = Field(min_length=1)
    prompt: str
    person: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Somebody in a square picture.

    pixels (S, S, 3) uint8; box (4,) and landmarks (5, 2) in its pixels; face: as the identity encoder wants it.
    """

    row: Row
    pixels: NDArray[np.uint8]
    box: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    face: Face


def parse(line: bytes) -> Row:
    """A line of the input; raises InvalidRequest."""
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        raise InvalidRequest('A row has to be {"image": path, "prompt": text, "person": name or null}.') from error


def find_subject(row: Row, folder: Path, size: int, detector: FaceDetector, reader: "PhotoReader") -> Subject:
    """The largest face of a row's picture, in the largest square around it, scaled to `size`.

    Paths are relative to `folder`. Raises PhotoError, NoFace.
    """
    try:
        photo = Photo(base64=base64.b64encode((folder / row.image).read_bytes()).decode())
    except OSError as error:
        raise PhotoUnreadable("A row's image cannot be read; paths are relative to the folder of the input.") from error
    (face,) = detector.detect(Person(photos=(photo,)), 0).faces
    rgb = reader.read(photo, "the row's image")
    (left, top), edge = _square(rgb.shape[1], rgb.shape[0], face.box.box)
    method = cv2.INTER_AREA if size < edge else cv2.INTER_CUBIC
    pixels = cv2.resize(rgb[top : top + edge, left : left + edge], (size, size), interpolation=method)

    def moved(points: ArrayLike) -> NDArray[np.float32]:
        # centres of pixels are at whole numbers, before and after
        return ((np.asarray(points, np.float32) - (left, top) + 0.5) * (size / edge) - 0.5).astype(np.float32)

    box = moved(np.reshape(face.box.box, (2, 2))).reshape(4)
    return Subject(row, np.ascontiguousarray(pixels), box, moved(face.landmarks), face)


def _square(width: int, height: int, box: Sequence[float]) -> tuple[tuple[int, int], int]:
    """The left top corner and the edge of the largest square whose middle is as near to the box's as can be."""
    edge = min(width, height)
    middles = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    corners = [
        round(min(max(m - edge / 2, 0), space - edge)) for m, space in zip(middles, (width, height), strict=True)
    ]
    return (corners[0], corners[1]), edge


class ExampleEncoder:
    """Subjects -> the tensors of examples."""

    def __init__(
        self, vae: "AutoencoderKL", text: "TextEncoder", length: int, recogniser: torch.nn.Module | None = None
    ) -> None:
        """length: tokens that T5 reads. recogniser: that of the ID loss, if there will be one."""
        self._vae, self._text, self._length, self._recogniser = vae, text, length, recogniser

    @torch.inference_mode()
    def encode(self, subject: Subject) -> dict[str, Tensor]:
        """One example, on the CPU: the fields of Batch, without the dimension B."""
        pixels = torch.from_numpy(subject.pixels).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, S, S)
        config, weight = self._vae.config, next(self._vae.parameters())
        latents = self._vae.encode(pixels.to(weight)).latent_dist.mode().float()
        text = self._text.encode(subject.row.prompt, self._length)
        example = {
            "latents": (latents[0].cpu() - config.shift_factor) * config.scaling_factor,
            "text": torch.tensor(text.tokens).to(torch.bfloat16),
            "pooled": torch.tensor(text.pooled),
            "embedding": torch.tensor(subject.face.embedding),
            "features": torch.tensor(subject.face.features).half(),  # values of 8 bits near 0..1
        }
        edge = example["latents"].shape[-1] // 2
        example["token_weights"] = 1 + _covered(subject.box, subject.pixels.shape[0], edge).flatten()
        if self._recogniser is not None:
            crops = face_crops(pixels, [subject.landmarks])
            device = next((x.device for x in self._recogniser.buffers()), crops.device)
            example["reference"] = self._recogniser(crops.to(device))[0].float().cpu()
        return example

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Prompts as FLUX reads them."""
        read = [self._text.encode(text, self._length) for text in texts]
        tokens = torch.stack([torch.tensor(text.tokens) for text in read]).to(torch.bfloat16)
        return Prompts(tokens, torch.stack([torch.tensor(text.pooled) for text in read]))


def _covered(box: NDArray[np.float32], size: int, cells: int) -> Tensor:
    """How much of each cell (cells, cells) of a square picture a box covers, in 0..1."""
    edges = torch.linspace(0, size, cells + 1)
    left, top, right, bottom = box.tolist()

    def overlap(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * (cells / size)

    return overlap(top, bottom)[:, None] * overlap(left, right)[None]


def write_shard(folder: Path, name: str, examples: Sequence[Mapping[str, Tensor]]) -> None:
    """Examples as one file of stacked tensors."""
    write_tensors(folder / name, {key: torch.stack([example[key] for example in examples]) for key in examples[0]})


def write_prompts(folder: Path, config: TrainingConfig, encoder: ExampleEncoder) -> None:
    """The prompts of the losses, read by T5 and CLIP."""
    both = {"id": encoder.prompts(config.id_prompts), "contrast": encoder.prompts(config.contrast_prompts)}
    parts = {f"{name}.{part}": getattr(prompts, part) for name, prompts in both.items() for part in ("text", "pooled")}
    write_tensors(folder / PROMPTS, parts)


def recipe(config: TrainingConfig, size: int, length: int, read: Mapping[str, Any]) -> dict[str, Any]:
    """What prepared examples depend on: a training reads only those that were prepared for it.

    read: what tells the files that were read from others, their sha256 say.
    """
    prompts = {"id_prompts": list(config.id_prompts), "contrast_prompts": list(config.contrast_prompts)}
    return {"preset": config.preset, "size": size, "text_tokens": length, **read, **prompts}


def write_index(
    folder: Path, made_as: Mapping[str, Any], shards: Iterable[tuple[str, Sequence[str | None]]], left_out: Counter[str]
) -> None:
    """index.json. shards: file names with the person of each of their examples; left_out: rows by error code."""
    listed = [{"file": name, "people": list(people)} for name, people in shards]
    index = {"recipe": dict(made_as), "left_out": dict(left_out), "shards": listed}
    partial = folder / f"{INDEX}.part"
    partial.write_text(json.dumps(index, ensure_ascii=False))
    partial.replace(folder / INDEX)


class Prepared:
    """Prepared examples as `Examples`; the reference is another picture of the same person where there is one."""

    def __init__(self, folder: Path) -> None:
        """Raises WeightsMissing where nothing is prepared."""
        self._folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise WeightsMissing(f"{folder} holds no prepared examples; prepare them first.") from error
        self.recipe: dict[str, Any] = index["recipe"]
        self.left_out: dict[str, int] = index["left_out"]
        self._places = [(s["file"], row) for s in index["shards"] for row in range(len(s["people"]))]
        self._people = [person for shard in index["shards"] for person in shard["people"]]
        self._files: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raises SettingsInvalid where they were prepared for another training, or there are none."""
        different = sorted(name for name in wanted if self.recipe.get(name) != wanted[name])
        if different:
            raise SettingsInvalid(f"{self._folder} was prepared with another {', '.join(different)}; prepare it anew.")
        if not self._places:
            raise SettingsInvalid(f"{self._folder} holds no example; rows were left out: {self.left_out}.")

    @cached_property
    def _pictures(self) -> dict[str, list[int]]:
        pictures: dict[str, list[int]] = {}
        for index, person in enumerate(self._people):
            if person is not None:
                pictures.setdefault(person, []).append(index)
        return pictures

    def reference(self, index: int, seed: int) -> int:
        """The example whose face is the reference of another one."""
        others = [other for other in self._pictures.get(self._people[index] or "", []) if other != index]
        return others[seed % len(others)] if others else index

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """These examples; each seed chooses among the other pictures of the person."""
        references = [self.reference(index, seed) for index, seed in zip(indices, seeds, strict=True)]
        fields: dict[str, Any] = {name: self._stack(name, indices) for name in TARGET}
        fields |= {name: self._stack(name, references) for name in REFERENCE if name in self._names}
        return Batch(**{name: tensor.float() for name, tensor in fields.items()})

    def prompts(self, name: str) -> Prompts:
        """The prompts of the ID loss ("id") or of the contrastive pair ("contrast")."""
        file = self._file(PROMPTS)
        return Prompts(file.get_tensor(f"{name}.text").float(), file.get_tensor(f"{name}.pooled"))

    @cached_property
    def _names(self) -> set[str]:
        return set(self._file(self._places[0][0]).keys())

    def _stack(self, name: str, indices: Sequence[int]) -> Tensor:
        places = [self._places[index] for index in indices]
        return torch.stack([self._file(file).get_slice(name)[row] for file, row in places])

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")  # mapped, not read
        return self._files[name]
