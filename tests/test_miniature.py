import hashlib
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoints
from pipeline.errors import WeightsMissing
from pipeline.miniature import files as miniature
from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.models.sampling import image_ids, noise, pack, unpack
from pipeline.settings import Settings
from pipeline.text import TextEncoder
from tests.test_checkpoints import Files

CPU = Settings(device="cpu")
# The SHA-256 of all tensors, in the order of their names. Where it changes, VERSION has to change with it, or old files
# stay in use.
TENSORS = {"1": "e142a7095a956fc9c36b0ba5b92a856f834a20cb2fe5077565a8e73cb247a144"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "miniature"
    miniature.make(folder)
    return folder


@pytest.fixture(scope="module")
def files(made: Path) -> Files:
    paths = {role: made / role for role in ("flux", "vae", "t5", "clip")}
    return Files({**paths, "eva_clip": made / miniature.EVA_CLIP, "pulid": made / miniature.PULID})


def digests(folder: Path) -> dict[str, str]:
    """Every file's sha256; the manifest's own is left out, since it also holds the files' times."""
    every = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in every}


def test_the_files_are_small_and_the_same_each_time(made: Path, tmp_path: Path) -> None:
    """Made twice they are the same bytes, under 10 MB together, in less than five seconds."""
    started = time.process_time()
    miniature.make(tmp_path / "again")
    assert time.process_time() - started < 5
    assert digests(tmp_path / "again") == digests(made)
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 10_000_000


def test_another_rule_is_another_version(made: Path) -> None:
    """The tensors of this VERSION are pinned: whoever changes them changes VERSION, and old files are replaced."""
    tensors = {str(path): load_file(path) for path in sorted(made.rglob("*.safetensors"))}
    tensors[miniature.EVA_CLIP] = torch.load(made / miniature.EVA_CLIP, weights_only=True)
    digest = hashlib.sha256()
    for state in tensors.values():
        for name in sorted(state):
            digest.update(name.encode() + state[name].numpy().tobytes())
    assert {miniature.VERSION: digest.hexdigest()} == TENSORS


def test_made_files_stay(made: Path) -> None:
    """A second call finds the files and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    miniature.make(made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_the_presets_files_are_found_and_verified(made: Path) -> None:
    """The preset miniature finds every role's files, makes them where they are not, and knows what they are."""
    settings = Settings(weights_dir=made.parent, device="cpu")
    located = checkpoints.files(settings)
    roles = ("eva_clip", "pulid", "flux", "vae", "t5", "clip")
    assert {made / name: sha256 for name, sha256 in located.hashes(*roles).items()} == {
        made / name: sha256 for name, sha256 in digests(made).items() if name != miniature.MARKER
    }
    assert located.path("eva_clip") == made / miniature.EVA_CLIP
    assert located.path("flux") == made / "flux"


def test_a_damaged_copy_is_mended(tmp_path: Path, made: Path) -> None:
    """A copy is as good as the files themselves; with a file changed or gone it is made anew."""
    folder = tmp_path / "miniature"
    shutil.copytree(made, folder, copy_function=shutil.copy)  # other times of change
    before = (folder / "manifest.json").stat().st_mtime_ns
    miniature.make(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (folder / "t5" / "config.json").unlink()
    miniature.make(folder)
    assert digests(folder) == digests(made)
    size = (folder / miniature.PULID).stat().st_size
    (folder / miniature.PULID).write_bytes(b"x" * size)
    miniature.make(folder)
    assert digests(folder) == digests(made)
    (folder / "manifest.json").write_text("{")
    miniature.make(folder)
    assert digests(folder) == digests(made)


@pytest.mark.parametrize("marker", [None, "0", miniature.VERSION])
def test_old_and_half_made_files_are_replaced(tmp_path: Path, made: Path, marker: str | None) -> None:
    """A folder of another version, or one without its mark, is made anew, and nothing of it stays."""
    folder = tmp_path / "miniature"
    (folder / "flux").mkdir(parents=True)
    (folder / "flux" / "old.safetensors").write_bytes(b"old")
    if marker is not None:
        (folder / miniature.MARKER).write_text(marker)
    miniature.make(folder)
    assert digests(folder) == digests(made)
    assert {path.name for path in tmp_path.iterdir()} == {"miniature", ".miniature.lock"}


def test_several_may_ask_at_once(tmp_path: Path, made: Path) -> None:
    """Callers that start together all find complete files, and no scraps are left beside them."""
    folder = tmp_path / "deep" / "miniature"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(miniature.make, [folder] * 8))
    assert digests(folder) == digests(made)
    assert {path.name for path in folder.parent.iterdir()} == {"miniature", ".miniature.lock"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Where the folder cannot be made, the error says which, and what to set."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsMissing, match=r"file/miniature .*PULID_WEIGHTS_DIR"):
        miniature.make(tmp_path / "file" / "miniature")


def test_the_tower_has_the_original_checkpoints_names(made: Path) -> None:
    """EVA-CLIP's file has the names of EVA02_CLIP_L_336_psz14_s6B.pt, in float16, for as many blocks as it has."""
    names = json.loads((Path(__file__).parent / "parity" / "eva_clip_keys.json").read_text())
    block = re.compile(r"visual\.blocks\.(\d+)\.")
    depth = 6
    expected = {
        name
        for name in names
        if name.startswith("visual.")
        and "rope" not in name
        and not ((found := block.match(name)) and int(found[1]) >= depth)
    }
    tensors = torch.load(made / miniature.EVA_CLIP, weights_only=True)
    assert tensors.keys() == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_loading_opens_no_connection(files: Files) -> None:
    """Every network loads from its files alone."""
    connections: list[str] = []
    watching = [True]  # a hook cannot be taken away again
    sys.addaudithook(lambda event, _: connections.append(event) if watching and event.startswith("socket.") else None)
    for load in (
        *(checkpoints.load_flux, checkpoints.load_vae, checkpoints.load_t5, checkpoints.load_clip),
        *(checkpoints.load_eva_clip, checkpoints.load_idformer, checkpoints.load_cross_attentions),
    ):
        load(files, CPU)
    watching.clear()
    assert connections == []


@torch.inference_mode()
def test_the_whole_way_through_the_networks(files: Files) -> None:
    """From prompt and face to pixels every size fits, numbers stay of ordinary size, and each input counts."""
    encoder = TextEncoder(checkpoints.load_t5(files, CPU), checkpoints.load_clip(files, CPU), {})
    idformer, attentions = checkpoints.load_idformer(files, CPU), checkpoints.load_cross_attentions(files, CPU)
    flux = IdentityFlux(checkpoints.load_flux(files, CPU), attentions)
    vae = checkpoints.load_vae(files, CPU)
    face = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 336, 336), dtype=np.float32))
    pooled, hidden = checkpoints.load_eva_clip(files, CPU)(face)
    arcface = torch.ones(1, 512)
    tokens = idformer(torch.cat((arcface, pooled / pooled.norm(dim=1, keepdim=True)), dim=1), hidden)
    assert tokens.shape == (1, 32, 64)

    latents, ids = pack(noise(7, 32, 32)), image_ids(16, 16)

    def velocity(prompt: str, *people: IdentityRows) -> torch.Tensor:
        text = encoder.encode(prompt, 128)
        given = torch.from_numpy(text.tokens)[None], torch.from_numpy(text.pooled)[None]
        return flux.predict(latents, torch.ones(1), torch.tensor([4.0]), *given, ids, people)

    plain = velocity("a man")
    assert plain.shape == (1, 256, 64)
    assert 0.05 < plain.std() < 20
    assert (velocity("a woman") - plain).abs().max() > 1e-3
    assert (velocity("a man", IdentityRows(tokens, torch.ones(1, 1, 1))) - plain).abs().max() > 1e-3
    image = vae.decode(unpack(latents - plain, 16, 16) / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert image.shape == (1, 3, 256, 256)
    assert image.clamp(-1, 1).std() > 0.1
