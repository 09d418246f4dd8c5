"""What `pulid demo` sends: a person nobody has seen before, in a scene of their own, and photos of real people."""

import base64
import importlib.util
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import FaceIndexOutOfRange, NoFace
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import Scene, held_out_scene, prompt
from pipeline.miniature.world import draw
from pipeline.request import MAX_PEOPLE
from pipeline.settings import Settings

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
SIZE = {"width": 256, "height": 256}
TOO_FEW = (NoFace.code, FaceIndexOutOfRange.code)


@dataclass(frozen=True, slots=True, eq=False)
class Portrait:
    """A drawn person: the drawing that is sent as the photo, the prompt, the pictures without and with the photo."""

    photo: Pixels
    prompt: str
    without: Pixels
    with_photo: Pixels

    def sheet(self) -> bytes:
        """The three side by side, as PNG."""
        return _png(np.concatenate((self.photo, self.without, self.with_photo), axis=1))

    def likeness(self, settings: Settings) -> tuple[float, float] | None:
        """How alike photo and picture are, without and with the photo: cosines by a recogniser that judges only.

        None where one of the three shows no face.
        """
        from pipeline import weights
        from pipeline.evaluation.judges import FaceJudge
        from pipeline.face_models import load_models

        judge = FaceJudge.load(load_models(settings), weights.locate(settings).path("judge"))
        looks = [judge.look(pixels) for pixels in (self.photo, self.without, self.with_photo)]
        found = [look.embedding / np.linalg.norm(look.embedding) for look in looks if look is not None]
        return (float(found[0] @ found[1]), float(found[0] @ found[2])) if len(found) == len(looks) else None


def portrait(client: httpx.Client, seed: int) -> Portrait:
    """Held-out person and scene number `seed`: drawn plainly, and asked for in the scene."""
    somebody, scene = person(FIRST_HELD_OUT + seed), held_out_scene(seed, style="drawing", light="soft")
    photo, words = draw(somebody, Scene()).pixels, prompt(scene, seed)
    without, with_photo = (
        _picture(client, {"prompt": words, "num_steps": 20, "seed": seed, **SIZE, **people})
        for people in ({}, {"people": [{"photos": [_base64(_png(photo))]}]})
    )
    return Portrait(photo, words, without, with_photo)


def real_faces(client: httpx.Client) -> Iterator[tuple[str, list[list[float]]]]:
    """What each photo shows, and the boxes (left, top, right, bottom) of the faces that the service finds in it.

    Ends the program with a sentence where these are fewer or more than one sees.
    """
    for name, photo, count in (("an astronaut", astronaut(), 1), ("six people", six_people(), 6)):
        parts = [range(first, min(first + MAX_PEOPLE, count)) for first in range(0, count, MAX_PEOPLE)]
        found = [_boxes(client, photo, part) for part in parts]
        if None in found:
            raise SystemExit(f"In the photo of {name} the service finds fewer than the {count} face(s) that it shows.")
        if _boxes(client, photo, range(count, count + 1)) is not None:
            raise SystemExit(f"In the photo of {name} the service finds more than the {count} face(s) that it shows.")
        yield name, [box for part in found if part is not None for box in part]


def _boxes(client: httpx.Client, photo: bytes, indices: Iterable[int]) -> list[list[float]] | None:
    """The boxes of the faces with these indices, from the left; None where there are not so many faces."""
    people = [{"photos": [_base64(photo)], "face": index} for index in indices]
    response = client.post("/v1/images", json={"prompt": "portrait", "num_steps": 1, "people": people, **SIZE})
    if response.status_code == 422 and response.json()["code"] in TOO_FEW:
        return None
    return [face["box"] for (face,) in _read(response)["faces"]]


def astronaut() -> bytes:
    """The photo of Eileen Collins (NASA, public domain) that scikit-image ships, as PNG."""
    from skimage import data

    return _png(data.astronaut())


def six_people() -> bytes:
    """insightface's own sample picture t1, as the JPEG that it is."""
    spec = importlib.util.find_spec("insightface")  # found, not imported, which takes seconds
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("insightface is not installed; install this package anew.")
    return (Path(spec.origin).parent / "data" / "images" / "t1.jpg").read_bytes()


def _picture(client: httpx.Client, body: dict[str, Any]) -> Pixels:
    answer = _ask(client, body)
    data = client.get(answer["images"][0]["url"]).raise_for_status().content
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    return _read(client.post("/v1/images", json=body))


def _read(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise SystemExit(f"The service answered {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
