"""From rows with pictures to prepared examples, and back as batches."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pipeline import checkpoints
from pipeline.errors import InvalidRequest, NoFace, PhotoUnreadable, SettingsInvalid, WeightsCorrupt, WeightsMissing
from pipeline.faces import FaceDetector
from pipeline.photos import PhotoReader
from pipeline.settings import Settings
from pipeline.text import TextEncoder
from pipeline.training.data import (
    ExampleEncoder,
    Prepared,
    Row,
    find_subject,
    parse,
    recipe,
    write_index,
    write_prompts,
    write_shard,
)
from pipeline.training.miniature.recogniser_networks import FAMILIES, build, write_onnx
from pipeline.training.recogniser import OnnxNetwork
from tests import training as toy
from tests.face_models import red_squares


@pytest.fixture(scope="module")
def settings(untrained: Path) -> Settings:
    return Settings(miniature_dir=untrained, device="cpu")


@pytest.fixture(scope="module")
def finder(settings: Settings) -> tuple[FaceDetector, PhotoReader]:
    return FaceDetector.load(settings), PhotoReader(settings)


def _picture(path: Path, width: int, height: int, *corners: tuple[int, int]) -> None:
    data = io.BytesIO()
    Image.fromarray(red_squares((width, height), *corners, edge=96)).save(data, "PNG")
    path.write_bytes(data.getvalue())


def test_a_subject_is_the_square_around_the_face(tmp_path: Path, finder: tuple[FaceDetector, PhotoReader]):
    """The largest square of a wide picture, as near to the face as it can be; points move with it."""
    _picture(tmp_path / "wide.png", 512, 256, (384, 64))
    subject = find_subject(Row(image="wide.png", prompt=""), tmp_path, 128, *finder)
    assert subject.pixels.shape == (128, 128, 3)
    red = (subject.pixels[..., 0] > 200) & (subject.pixels[..., 2] < 50)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max() + 1) == (32, 80)  # 64 to 160 of 256, halved
    assert (columns.min(), columns.max() + 1) == (64, 112)  # the square begins at 256
    left, top, right, bottom = subject.box
    for x, y in subject.landmarks:
        assert left < x < right
        assert top < y < bottom
        assert red[round(float(y)), round(float(x))]


def test_rows_that_cannot_be_used_say_why(tmp_path: Path, finder: tuple[FaceDetector, PhotoReader]):
    """Not a row, no picture, nobody in it: each has its own code."""
    for line in (b"", b"{", b'{"prompt": "x"}', b'{"image": "a", "prompt": "x", "more": 1}'):
        with pytest.raises(InvalidRequest):
            parse(line)
    assert parse(b'{"image": "a.png", "prompt": "x"}') == Row(image="a.png", prompt="x")
    with pytest.raises(PhotoUnreadable):
        find_subject(Row(image="none.png", prompt=""), tmp_path, 128, *finder)
    _picture(tmp_path / "nobody.png", 256, 256)
    with pytest.raises(NoFace):
        find_subject(Row(image="nobody.png", prompt=""), tmp_path, 128, *finder)


def test_prepared_examples_come_back_as_batches(
    tmp_path: Path, settings: Settings, finder: tuple[FaceDetector, PhotoReader]
):
    """Latents as FLUX reads them, the prompt, the face's weight, and of another picture of the person the reference."""
    files = checkpoints.files(settings)
    recogniser = OnnxNetwork(files.path("recogniser"))
    encoder = ExampleEncoder(checkpoints.load_vae(files, settings), TextEncoder.load(settings), 32, recogniser)
    people = ["one", "one", "two", None]
    for number in range(4):
        _picture(tmp_path / f"{number}.png", 256, 256, (32 * number, 64))
    rows = [Row(image=f"{number}.png", prompt=f"portrait {number}", person=p) for number, p in enumerate(people)]
    examples = [encoder.encode(find_subject(row, tmp_path, 256, *finder)) for row in rows]
    config = toy.config(preset="miniature")
    write_shard(tmp_path, "a.safetensors", examples[:3])
    write_shard(tmp_path, "b.safetensors", examples[3:])
    write_prompts(tmp_path, config, encoder)
    made_as = recipe(config, 256, 32, {})
    write_index(tmp_path, made_as, [("a.safetensors", people[:3]), ("b.safetensors", people[3:])], Counter(no_face=2))

    prepared = Prepared(tmp_path)
    prepared.check(made_as)
    assert (len(prepared), prepared.left_out) == (4, {"no_face": 2})
    batch = prepared.batch([0, 2, 3], [5, 5, 5])
    assert batch.latents.shape == (3, 16, 16, 16)
    assert batch.text.shape == (3, 32, 96)
    assert batch.token_weights is not None
    # box of three cells of 32 pixels, which are tokens here
    assert batch.token_weights.shape == (3, 64)
    assert batch.token_weights.max() == pytest.approx(2, abs=0.1)
    assert batch.token_weights.min() == 1
    torch.testing.assert_close(batch.latents[1], examples[2]["latents"])
    torch.testing.assert_close(batch.embedding[0], examples[1]["embedding"])  # the other picture of "one"
    torch.testing.assert_close(batch.embedding[1:], torch.stack([e["embedding"] for e in examples[2:]]))
    assert batch.reference is not None
    torch.testing.assert_close(batch.reference[0], examples[1]["reference"])
    assert len(prepared.prompts("id")) == 1
    assert len(prepared.prompts("contrast")) == 15


def test_a_reference_is_any_other_picture_of_the_person(tmp_path: Path):
    """The seed chooses among them, evenly, and never the picture itself."""
    write_index(tmp_path, {}, [("a", ["x", "y", "x"]), ("b", ["x"])], Counter())
    prepared = Prepared(tmp_path)
    assert [prepared.reference(0, seed) for seed in range(4)] == [2, 3, 2, 3]
    assert [prepared.reference(2, seed) for seed in range(2)] == [0, 3]
    assert prepared.reference(1, 7) == 1


def test_what_was_prepared_for_another_training_is_refused(tmp_path: Path):
    """Other rows, prompts, sizes or recognisers are named; a folder without examples, or with none in it, is told."""
    with pytest.raises(WeightsMissing):
        Prepared(tmp_path)
    made_as = recipe(toy.config(), 512, 128, {"rows": "a", "recogniser": "aa"})
    write_index(tmp_path, made_as, [("a", [None])], Counter())
    Prepared(tmp_path).check(made_as)
    with pytest.raises(SettingsInvalid, match="recogniser, rows, size"):
        Prepared(tmp_path).check(recipe(toy.config(), 768, 128, {"rows": "b", "recogniser": "bb"}))
    write_index(tmp_path, made_as, [], Counter(no_face=3))
    with pytest.raises(SettingsInvalid, match="no_face"):
        Prepared(tmp_path).check(made_as)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recogniser_of_torch_is_the_one_of_onnx(tmp_path: Path, family: str):
    """The same embeddings as onnxruntime's, with a gradient for the picture and none for itself."""
    torch.manual_seed(0)
    write_onnx(build(family), tmp_path / "recogniser.onnx")
    network = OnnxNetwork(tmp_path / "recogniser.onnx")
    crops = (torch.rand(2, 3, 112, 112) * 2 - 1).requires_grad_()
    session = onnxruntime.InferenceSession(str(tmp_path / "recogniser.onnx"))
    (expected,) = session.run(None, {"crops": crops.detach().numpy()})
    embeddings = network(crops)
    torch.testing.assert_close(embeddings.detach(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    embeddings.square().sum().backward()
    assert crops.grad is not None
    assert crops.grad.abs().sum() > 0
    assert not list(network.parameters())


def test_a_file_that_is_no_recogniser_is_refused(tmp_path: Path, settings: Settings):
    """Damaged, or a detector: a sentence that names it."""
    (tmp_path / "damaged.onnx").write_bytes(b"not a model")
    with pytest.raises(WeightsCorrupt, match="ONNX"):
        OnnxNetwork(tmp_path / "damaged.onnx")
    with pytest.raises(WeightsCorrupt, match="Reshape"):
        OnnxNetwork(checkpoints.files(settings).path("detector"))


def test_index_json_is_plain(tmp_path: Path):
    """Anybody can read what was prepared."""
    write_index(tmp_path, {"size": 8}, [("a", ["Zoë", None])], Counter(no_face=1))
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {
        "recipe": {"size": 8},
        "left_out": {"no_face": 1},
        "shards": [{"file": "a", "people": ["Zoë", None]}],
    }
