"""The miniature's files: those that ship, and what holds for any miniature, trained or not."""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from cluster.local import check
from pipeline import checkpoints, weights
from pipeline.errors import WeightsCorrupt, WeightsMissing
from pipeline.miniature import configs, tokenizers
from pipeline.miniature.files import PRESET, place, save_transformer, write_manifest
from pipeline.miniature.scenes import WORDS, held_out_scene, prompt, scene
from pipeline.models.eva_clip import EvaClip
from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.models.sampling import image_ids, noise, pack, unpack
from pipeline.models.sizes import MINIATURE, OFFICIAL
from pipeline.settings import Settings
from pipeline.text import CLIP_LENGTH, TextEncoder
from tests.test_checkpoints import original_eva_clip

ROOT = Path(__file__).parent.parent
ROLES = [spec.role for spec in PRESET.specs]


def shipped() -> list[Path]:
    return sorted(path for path in weights.SHIPPED.rglob("*") if path.is_file())


@pytest.fixture
def copy(untrained: Path, tmp_path: Path) -> Path:
    """A miniature whose files a test may take away, but not write to: they are the untrained one's own."""
    shutil.copytree(untrained, tmp_path / "miniature", copy_function=os.link)
    return tmp_path / "miniature"


def located(folder: Path) -> weights.WeightFiles:
    return weights.locate(Settings(miniature_dir=folder))


def test_the_shipped_files_are_the_verified_ones() -> None:
    """Without any setting the miniature is the one in the package: each file of each role is there, and as it was."""
    found = weights.verify(Settings())
    assert {finding.state for finding in found} == {"verified"}
    assert {finding.spec.role for finding in found} == set(ROLES)
    others = {path.relative_to(weights.SHIPPED).as_posix() for path in shipped()} - {finding.file for finding in found}
    assert others == {"manifest.json", "README.md"}


def test_the_shipped_files_are_small_and_packaged() -> None:
    """They take at most 40 MB together, and pyproject.toml's patterns put every one of them into a wheel."""
    assert sum(path.stat().st_size for path in shipped()) <= 40_000_000
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pipeline"]
    package = ROOT / "pipeline"
    assert set(shipped()) <= {path for pattern in patterns for path in package.glob(pattern)}


def test_everybody_may_read_the_files(untrained: Path) -> None:
    """Whoever installed them: safetensors' own writer would let nobody else."""
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in untrained.rglob("*.*"))


def test_a_service_needs_only_what_draws(copy: Path, tmp_path: Path) -> None:
    """It starts without the judge, which only an evaluation asks, and not without a parser."""
    settings = Settings.from_environment({}, miniature_dir=copy, store__url=f"file://{tmp_path}")
    place(copy, "judge").unlink()
    check(settings)
    place(copy, "parsing").unlink()
    with pytest.raises(WeightsMissing, match="parsing_bisenet"):
        check(settings)


def test_a_copy_is_as_good(untrained: Path, tmp_path: Path) -> None:
    """A manifest holds no times: a checkout, a wheel and a copy are verified by what is in the files."""
    copy = shutil.copytree(untrained, tmp_path / "miniature", copy_function=shutil.copy)  # other times of change
    assert located(copy).hashes(*ROLES).keys() == json.loads((copy / "manifest.json").read_text())["files"].keys()
    before = (copy / "manifest.json").read_bytes()
    write_manifest(copy)
    assert (copy / "manifest.json").read_bytes() == before
    assert b'mtime_ns": null' in before


def test_a_damaged_file_is_not_used(copy: Path) -> None:
    """A file of another content is refused and named, with what to do."""
    path = place(copy, "pulid")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(WeightsCorrupt, match=r"pulid_flux_miniature\.safetensors .*PULID_MINIATURE_DIR"):
        located(copy).hashes("pulid")


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_file_is_told(copy: Path, role: str) -> None:
    """A miniature without one of its roles is not used, and no manifest is written for it."""
    path = place(copy, role)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "manifest.json").unlink()
    with pytest.raises(WeightsMissing, match="is missing; .*PULID_MINIATURE_DIR"):
        located(copy).path(role)
    with pytest.raises(WeightsMissing):
        write_manifest(copy)


def test_the_tower_has_open_clips_names(untrained: Path) -> None:
    """The tower's names are open_clip's for EVA02-L-14-336, for as many blocks as it has."""
    names = json.loads((Path(__file__).parent / "parity" / "eva_clip_keys.json").read_text())
    block = re.compile(r"visual\.blocks\.(\d+)\.")
    depth = MINIATURE.eva_clip["depth"]
    expected = {
        name
        for name in names
        if name.startswith("visual.")
        and "rope" not in name
        and not ((found := block.match(name)) and int(found[1]) >= depth)
    }
    for folder in (untrained, weights.SHIPPED):
        assert original_eva_clip(folder).keys() == expected
        assert all(name.startswith("visual.trunk.") for name in load_file(located(folder).path("eva_clip")))


def test_the_towers_tokens_are_counted() -> None:
    """A face is as many tokens as the tower really makes of it: 577 officially, 145 in the miniature."""
    assert (OFFICIAL.face_tokens, MINIATURE.face_tokens) == (577, 145)
    with torch.inference_mode():
        pooled, hidden = EvaClip(**MINIATURE.eva_clip)(torch.zeros(1, 3, 336, 336))
    assert pooled.shape == (1, 64)
    assert [states.shape for states in hidden] == [(1, MINIATURE.face_tokens, 96)] * 5


def test_clip_is_a_whole_one(untrained: Path) -> None:
    """The folder clip/ holds both towers, as openai/clip-vit-large-patch14's does."""
    model, told = CLIPModel.from_pretrained(untrained / "clip", output_loading_info=True, local_files_only=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.vision_config.image_size == configs.CLIP_VISION["image_size"]


def test_every_prompt_of_the_world_is_read_whole(untrained: Path) -> None:
    """Both tokenizers know the world's words as one piece each, so that no prompt of the world is cut."""
    t5 = T5Tokenizer.from_pretrained(untrained / "t5", local_files_only=True)
    clip = CLIPTokenizer.from_pretrained(untrained / "clip", local_files_only=True)
    for word in WORDS:
        assert t5.tokenize(word) == ["\u2581" + word]
        assert len(clip.tokenize(word)) == 1 + 2 * word.count("-")
    prompts = [prompt(make(seed), seed) for seed in range(200) for make in (scene, held_out_scene)]
    assert max(len(t5(words).input_ids) for words in prompts) <= configs.TEXT_LENGTH == t5.model_max_length
    assert max(len(clip(words).input_ids) for words in prompts) <= CLIP_LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_capitals_mean_nothing(untrained: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """T5 reads Portrait and PORTRAIT to the bit as it reads portrait, and small letters as it did before."""
    trained = T5EncoderModel(T5Config(**configs.t5(len(tokenizers.t5_vocabulary(WORDS))))).eval()
    more = tokenizers.with_capitals(trained, WORDS)
    save_transformer(more.to(dtype), tmp_path)
    tokenizer = T5Tokenizer.from_pretrained(untrained / "t5", local_files_only=True)
    read = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert read.config.vocab_size == len(tokenizer)

    def states(model: T5EncoderModel, words: str) -> torch.Tensor:
        return model(torch.tensor([tokenizer(words).input_ids])).last_hidden_state

    for seed in range(20):
        words = prompt(scene(seed), seed)
        for form in (words.upper(), words.capitalize(), " ".join(word.capitalize() for word in words.split(" "))):
            assert torch.equal(states(read, form), states(read, words))
        if dtype == torch.float32:
            assert torch.equal(states(read, words), states(trained, words))


def test_loading_opens_no_connection(untrained: Path) -> None:
    """Every network loads from its files alone."""
    connections: list[str] = []
    watching = [True]  # a hook cannot be taken away again
    sys.addaudithook(lambda event, _: connections.append(event) if watching and event.startswith("socket.") else None)
    settings = Settings(miniature_dir=untrained, device="cpu")
    for load in (
        *(checkpoints.load_flux, checkpoints.load_vae, checkpoints.load_t5, checkpoints.load_clip),
        *(checkpoints.load_eva_clip, checkpoints.load_idformer, checkpoints.load_cross_attentions),
    ):
        load(located(untrained), settings)
    watching.clear()
    assert connections == []


@torch.inference_mode()
def test_the_whole_way_through_the_networks(untrained: Path) -> None:
    """From prompt and face to pixels every size fits, numbers stay of ordinary size, and each input counts."""
    files, cpu = located(untrained), Settings(device="cpu")
    encoder = TextEncoder(checkpoints.load_t5(files, cpu), checkpoints.load_clip(files, cpu), {})
    idformer, attentions = checkpoints.load_idformer(files, cpu), checkpoints.load_cross_attentions(files, cpu)
    intervals = MINIATURE.double_interval, MINIATURE.single_interval
    flux = IdentityFlux(checkpoints.load_flux(files, cpu), attentions, *intervals)
    vae = checkpoints.load_vae(files, cpu)
    face = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 336, 336), dtype=np.float32))
    pooled, hidden = checkpoints.load_eva_clip(files, cpu)(face)
    tokens = idformer(torch.cat((torch.ones(1, 512), pooled / pooled.norm(dim=1, keepdim=True)), dim=1), hidden)
    assert tokens.shape == idformer.unconditional(MINIATURE.face_tokens).shape == (1, 32, 96)

    latents, ids = pack(noise(7, 16, 16)), image_ids(8, 8)

    def velocity(words: str, *people: IdentityRows) -> torch.Tensor:
        text = encoder.encode(words, 128)
        given = torch.tensor(text.tokens)[None], torch.tensor(text.pooled)[None]
        return flux.predict(latents, torch.ones(1), torch.tensor([4.0]), *given, ids, people)

    plain = velocity("a person in a garden")
    assert plain.shape == (1, 64, 64)
    assert 0.05 < plain.std() < 20
    assert (velocity("a person in space") - plain).abs().max() > 1e-3
    assert (velocity("a person in a garden", IdentityRows(tokens, torch.ones(1, 1, 1))) - plain).abs().max() > 1e-3
    image = vae.decode(unpack(latents - plain, 8, 8) / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert image.shape == (1, 3, 256, 256)
    assert image.clamp(-1, 1).std() > 0.1
