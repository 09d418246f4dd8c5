import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import checkpoints
from pipeline.miniature import configs
from pipeline.settings import Settings
from pipeline.text import CLIP_LENGTH, Text, TextEncoder, pieces
from tests.test_checkpoints import Files

CPU = Settings(device="cpu")
PROMPTS = (
    "",
    "portrait, color, cinematic",
    "a man with glasses " * 40,
    "\u7530\u4e2d \U0001f600 caf\u00e9",
    "x" * 8192,
)


def load(folder: Path) -> TextEncoder:
    files = Files({"t5": folder / "t5", "clip": folder / "clip"})
    return TextEncoder(
        checkpoints.load_t5(files, CPU), checkpoints.load_clip(files, CPU), {"t5/model.safetensors": "0" * 64}
    )


@pytest.fixture(scope="module")
def encoder(untrained: Path) -> TextEncoder:
    return load(untrained)


@pytest.fixture(scope="module")
def wide(untrained: Path) -> TextEncoder:
    """The same encoders with a T5 tokenizer that reads as much as FLUX.1's."""
    files = Files({"t5": untrained / "t5", "clip": untrained / "clip"})
    tokenizer, t5 = checkpoints.load_t5(files, CPU)
    tokenizer.model_max_length = 512
    return TextEncoder((tokenizer, t5), checkpoints.load_clip(files, CPU), {})


def same(one: Text, other: Text) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.pooled, other.pooled)


@pytest.mark.parametrize("length", [128, 256, 384, 512])
def test_a_text_has_the_asked_length(wide: TextEncoder, length: int) -> None:
    """Tokens are as many as asked for, float32, finite."""
    text = wide.encode("portrait, color, cinematic", length)
    assert text.tokens.shape == (length, configs.T5["d_model"])
    assert text.pooled.shape == (configs.CLIP_TEXT["hidden_size"],)
    assert text.tokens.dtype == text.pooled.dtype == np.float32
    assert np.isfinite(text.tokens).all()
    assert np.isfinite(text.pooled).all()


def test_a_text_is_never_longer_than_its_t5_reads(encoder: TextEncoder) -> None:
    """The miniature's T5 reads 32 tokens, whatever is asked for; the trace names the stage and the files."""
    text = encoder.encode("portrait, color, cinematic", 128)
    assert text.tokens.shape == (configs.TEXT_LENGTH, configs.T5["d_model"])
    assert same(text, encoder.encode("portrait, color, cinematic", 512))
    assert list(text.trace.seconds) == ["text"]
    assert text.trace.models == {"t5/model.safetensors": "0" * 64}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_padding_and_cutting_are_the_tokenizers_own(untrained: Path, prompt: str) -> None:
    """The ids are those that a tokenizer of its own gives when it is asked to pad and truncate."""
    files = Files({"t5": untrained / "t5", "clip": untrained / "clip"})
    for loader, length in (
        (checkpoints.load_t5, 128),
        (checkpoints.load_t5, 512),
        (checkpoints.load_clip, CLIP_LENGTH),
    ):
        asked, _ = loader(files, CPU)
        expected = asked(prompt, padding="max_length", truncation=True, max_length=length).input_ids
        bare, _ = loader(files, CPU)
        assert pieces(bare, prompt, length)[0] == expected


def test_padding_is_not_masked(wide: TextEncoder, untrained: Path) -> None:
    """T5 sees the padding as the official code's does: no mask, last hidden state; CLIP gives its pooled output."""
    files = Files({"t5": untrained / "t5", "clip": untrained / "clip"})
    text = wide.encode("a red hat", 128)
    with torch.inference_mode():
        tokenizer, t5 = checkpoints.load_t5(files, CPU)
        batch = tokenizer("a red hat", padding="max_length", max_length=128, return_tensors="pt")
        bare = t5(batch.input_ids, attention_mask=None).last_hidden_state[0].numpy()
        masked = t5(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[0].numpy()
        tokenizer, clip = checkpoints.load_clip(files, CPU)
        batch = tokenizer("a red hat", padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt")
        pooled = clip(batch.input_ids).pooler_output[0].numpy()
    np.testing.assert_array_equal(text.tokens, bare)
    assert np.abs(text.tokens - masked).max() > 1e-3
    np.testing.assert_array_equal(text.pooled, pooled)


def test_a_text_tells_when_it_was_cut(encoder: TextEncoder, wide: TextEncoder) -> None:
    """A prompt of exactly as many tokens as are read is whole; one more and it says that its end was not read."""
    for reader, most in ((encoder, 32), (wide, 128)):
        whole = " ".join(["hat"] * (most - 1))  # and the end token
        assert not reader.encode(whole, 128).truncated
        cut = reader.encode(whole + " hat", 128)
        assert cut.truncated
        np.testing.assert_array_equal(cut.tokens, reader.encode(whole + " hat glasses", 128).tokens)
    assert not wide.encode(whole + " hat", 256).truncated


def test_the_encoder_loads_from_the_settings(untrained: Path, encoder: TextEncoder) -> None:
    """`load` reads the preset's files, and a text then names them with their sha256."""
    text = TextEncoder.load(Settings(miniature_dir=untrained, device="cpu")).encode("a man", 128)
    assert same(text, encoder.encode("a man", 128))
    assert {name.split("/")[0] for name in text.trace.models} == {"t5", "clip"}
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in text.trace.models.values())


def test_prompts_differ(encoder: TextEncoder) -> None:
    """Another prompt is another text, in both encoders."""
    one, other = encoder.encode("a beanie", 128), encoder.encode("a sweater", 128)
    assert not np.array_equal(one.tokens, other.tokens)
    assert not np.array_equal(one.pooled, other.pooled)


def test_calls_at_once_do_not_meet(wide: TextEncoder) -> None:
    """Threads with different lengths get what they would get alone: no length is left on a shared tokenizer."""
    calls = [(prompt, length) for prompt in PROMPTS for length in (128, 256, 512)] * 4
    alone = {call: wide.encode(*call) for call in dict.fromkeys(calls)}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda call: wide.encode(*call), calls))
    for call, text in zip(calls, together, strict=True):
        assert text.tokens.shape == alone[call].tokens.shape
        assert text.truncated == alone[call].truncated
        np.testing.assert_allclose(text.tokens, alone[call].tokens, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(text.pooled, alone[call].pooled, rtol=1e-5, atol=1e-5)


def test_a_length_saved_in_the_tokenizers_file_is_not_used(
    untrained: Path, tmp_path: Path, encoder: TextEncoder
) -> None:
    """Published tokenizer.json files may hold a truncation and a padding; the argument alone decides."""
    for role in ("t5", "clip"):
        shutil.copytree(untrained / role, tmp_path / role)
        file = tmp_path / role / "tokenizer.json"
        saved = json.loads(file.read_text())
        saved["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        saved["padding"] = {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>" if role == "t5" else "<|endoftext|>",
        }
        file.write_text(json.dumps(saved))
    prompt = "a man with glasses and a red hat in the garden"
    assert same(load(tmp_path).encode(prompt, 128), encoder.encode(prompt, 128))
