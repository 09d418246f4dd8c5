"""A preset's files: found, fetched, verified."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cluster import weights_cli
from pipeline.errors import LicenceNotAccepted, WeightsCorrupt, WeightsMissing
from pipeline.manifest import Manifest
from pipeline.presets import Archive, Licence, ModelFile, ModelSpec, Preset
from pipeline.settings import Settings
from pipeline.weights import PRESETS, Source, fetch, findings, locate, verify
from tests.shelf import Shelf, serve, sha256

FREE = Licence("Free", "https://free.example", True)
RESEARCH = Licence("Research only", "https://research.example", False)
FLUX, PULID, DETECTOR, CONFIG, MODEL = b"flux" * 9000, b"pulid", b"detector", b"{}", b"model" * 100
RECOGNISER = b"recogniser"
ZIP = Archive("deep/insight", "v0.7", ModelFile("faces.zip"))
FACES = ModelSpec("detector", "faces", (ModelFile("det.onnx", len(DETECTOR), sha256(DETECTOR)),), RESEARCH, "o/faces")
PRESET = Preset(
    "flux-dev",
    "small",
    (
        ModelSpec("flux", "flux", (ModelFile("f.sft", len(FLUX), sha256(FLUX)),), RESEARCH, "bfl/flux", gated=True),
        ModelSpec("pulid", "pulid", (ModelFile("p.sft", None, sha256(PULID)),), FREE, "x/pulid", "v1", "github"),
        ModelSpec("t5", "t5", (ModelFile("config.json"), ModelFile("model.sft")), FREE, "x/t5", "abc"),
        replace(FACES, archive=ZIP),
        replace(FACES, role="recogniser", files=(ModelFile("rec.onnx", None, sha256(RECOGNISER)),), archive=ZIP),
    ),
)
HUB = {
    "/bfl/flux/resolve/main/f.sft": FLUX,
    "/x/pulid/releases/download/v1/p.sft": PULID,
    "/x/t5/resolve/abc/config.json": CONFIG,
    "/x/t5/resolve/abc/model.sft": MODEL,
    "/o/faces/resolve/main/det.onnx": DETECTOR,
    "/o/faces/resolve/main/rec.onnx": RECOGNISER,
}


@pytest.fixture
def shelf():
    with serve(Shelf(dict(HUB))) as running:
        yield running


@pytest.fixture
def settings(tmp_path):
    return Settings(preset="flux-dev", weights_dir=tmp_path / "weights")


def bring(settings, shelf, accept=True, **source):
    wanted = Source(shelf.url, shelf.url, attempts=2, pause=lambda _: None, **source)
    return fetch(settings, accept, source=wanted, preset=PRESET)


def states(settings, read=True):
    return {finding.file: finding.state for finding in findings(settings, PRESET, read)}


def test_the_table():
    """Every preset has every role once, sha256 and sizes are well formed, and nothing non-commercial lacks its page."""
    for name, preset in PRESETS.items():
        assert preset.name == name
        roles = [spec.role for spec in preset.specs]
        assert len(roles) == len(set(roles))
        assert {"flux", "vae", "t5", "clip", "eva_clip", "pulid"} <= set(roles)
        for file in (file for spec in preset.specs for file in spec.files):
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    real = [preset for preset in PRESETS.values() if preset.name != "miniature"]
    assert all({"detector", "recogniser", "retinaface", "parsing"} <= {s.role for s in p.specs} for p in real)
    assert all(s.licence.page.startswith("https://") and s.repository for p in real for s in p.specs)
    assert [p.name for p in PRESETS.values() if not p.guidance and not p.shift] == ["flux-schnell"]
    shared = [{s for s in preset.specs if s.role not in ("flux", "vae")} for preset in real]
    assert all(specs == shared[0] for specs in shared)


def test_everything_is_fetched_and_found(settings, shelf):
    """Each file comes once and is located by its role: one file as a file, several as their folder."""
    assert len(bring(settings, shelf)) == len(HUB) == len(shelf.asked)
    files = locate(settings, PRESET)
    assert files.path("flux").read_bytes() == FLUX
    assert files.path("t5") == settings.weights_dir / "t5"
    assert files.hashes("pulid", "t5") == {
        "pulid/p.sft": sha256(PULID),
        "t5/config.json": sha256(CONFIG),
        "t5/model.sft": sha256(MODEL),
    }
    assert set(states(settings).values()) == {"verified"}


def test_a_second_run_is_offline(settings, shelf):
    """With everything there nothing connects, nothing is written, and no licence is asked for again."""
    bring(settings, shelf)
    asked = len(shelf.asked)
    before = (settings.weights_dir / "manifest.json").stat().st_mtime_ns
    nowhere = Source("http://127.0.0.1:1", "http://127.0.0.1:1", attempts=1)
    assert fetch(settings, False, source=nowhere, preset=PRESET) == []
    assert len(shelf.asked) == asked
    assert (settings.weights_dir / "manifest.json").stat().st_mtime_ns == before


def test_licences_come_first(settings, shelf):
    """Without acceptance each closed licence is named with its page, and not one request is made."""
    with pytest.raises(LicenceNotAccepted, match=r"Research only \(https://research.example\).*--accept-licences"):
        bring(settings, shelf, accept=False)
    assert shelf.asked == []
    free = replace(PRESET, specs=tuple(spec for spec in PRESET.specs if spec.licence is FREE))
    fetch(settings, False, source=Source(shelf.url, shelf.url), preset=free)
    assert (settings.weights_dir / "pulid" / "p.sft").read_bytes() == PULID


def test_only_the_hub_sees_the_token(settings, shelf):
    """The GitHub files are asked for without it."""
    bring(settings, shelf, token="hf_secret")
    seen = {path: headers.get("authorization") for path, headers in shelf.asked}
    assert seen.pop("/x/pulid/releases/download/v1/p.sft") is None
    assert set(seen.values()) == {"Bearer hf_secret"}


def test_a_gated_file(settings, shelf):
    """A refusal says where to accept and how to pass a token."""
    shelf.status["/bfl/flux/resolve/main/f.sft"] = 401
    with pytest.raises(LicenceNotAccepted, match=r"https://research.example .* HF_TOKEN"):
        bring(settings, shelf)


def test_a_wrong_file_is_named(settings, shelf):
    """Bytes with another sha256 never get a place."""
    shelf.files["/x/pulid/releases/download/v1/p.sft"] = b"wrong"
    with pytest.raises(WeightsCorrupt, match=r"p\.sft"):
        bring(settings, shelf)
    assert not (settings.weights_dir / "pulid" / "p.sft").exists()


def test_trust_on_first_use(settings, shelf):
    """A file of unknown sha256 is held to the one it had the first time."""
    bring(settings, shelf)
    (settings.weights_dir / "t5" / "model.sft").unlink()
    shelf.files["/x/t5/resolve/abc/model.sft"] = b"another"
    with pytest.raises(WeightsCorrupt, match=r"model\.sft"):
        bring(settings, shelf)
    shelf.files["/x/t5/resolve/abc/model.sft"] = MODEL
    assert bring(settings, shelf) == ["t5/model.sft"]


def test_damage_is_found_and_mended(settings, shelf):
    """An altered file is corrupt when it is read and when it is used; a fetch brings that one anew."""
    bring(settings, shelf)
    (settings.weights_dir / "flux" / "f.sft").write_bytes(FLUX[::-1])
    assert states(settings)["flux/f.sft"] == "corrupt"
    with pytest.raises(WeightsCorrupt, match=r"f\.sft"):
        locate(settings, PRESET).hashes("flux")
    assert bring(settings, shelf) == ["flux/f.sft"]
    (settings.weights_dir / "flux" / "f.sft").write_bytes(b"short")
    with pytest.raises(WeightsCorrupt, match="5 bytes"):
        locate(settings, PRESET).path("flux")


def test_unchanged_files_are_not_read(settings, shelf):
    """Size and time of change stand for the sha256; with another time the file is read, and still right."""
    bring(settings, shelf)
    path = settings.weights_dir / "flux" / "f.sft"
    times = path.stat().st_mtime_ns
    path.write_bytes(FLUX[::-1])
    os.utime(path, ns=(times, times))
    assert locate(settings, PRESET).hashes("flux") == {"flux/f.sft": sha256(FLUX)}
    assert states(settings, read=False)["flux/f.sft"] == "verified"
    assert states(settings, read=True)["flux/f.sft"] == "corrupt"
    path.write_bytes(FLUX)
    os.utime(path, ns=(1, 1))
    assert states(settings, read=False)["flux/f.sft"] == "unverified"
    assert locate(settings, PRESET).hashes("flux") == {"flux/f.sft": sha256(FLUX)}


def test_files_put_there_by_hand(settings, shelf):
    """They are used as unverified; a fetch reads them, remembers the right ones and fetches the others."""
    for folder, name, data in (("flux", "f.sft", FLUX), ("pulid", "p.sft", b"wrong")):
        (settings.weights_dir / folder).mkdir(parents=True)
        (settings.weights_dir / folder / name).write_bytes(data)
    assert locate(settings, PRESET).hashes("flux") == {"flux/f.sft": "unverified"}
    bring(settings, shelf)
    assert shelf.count("/bfl/flux/resolve/main/f.sft") == 0
    assert locate(settings, PRESET).hashes("flux", "pulid") == {
        "flux/f.sft": sha256(FLUX),
        "pulid/p.sft": sha256(PULID),
    }


def test_a_missing_file_says_what_to_do(settings):
    """The path, and the command that fetches it; a role without files names the preset."""
    with pytest.raises(WeightsMissing, match=r"p\.sft is missing; run `pulid weights fetch --preset flux-dev`"):
        locate(settings, PRESET).path("pulid")
    with pytest.raises(WeightsMissing, match="miniature has no file for the role retinaface"):
        locate(Settings()).path("retinaface")


def test_a_flux_file_of_ones_own(settings, shelf, tmp_path):
    """It takes flux's place, a file or a folder, is not fetched over, and counts as unverified."""
    own = tmp_path / "flux" / "f.sft"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    settings = settings.model_copy(update={"flux_file": own})
    bring(settings, shelf)
    assert shelf.count("/bfl/flux/resolve/main/f.sft") == 0
    assert locate(settings, PRESET).path("flux") == own
    assert locate(settings, PRESET).hashes("flux") == {"f.sft": "unverified"}
    settings = settings.model_copy(update={"flux_file": own.parent})
    assert locate(settings, PRESET).path("flux") == own.parent
    assert locate(settings, PRESET).hashes("flux") == {"flux/f.sft": "unverified"}
    for other in ("vae/v.sft", "transformer/t.sft", "transformer/.cache/note"):  # a whole pipeline's folder
        (own.parent / other).parent.mkdir(exist_ok=True)
        (own.parent / other).touch()
    assert locate(settings, PRESET).hashes("flux") == {"flux/transformer/t.sft": "unverified"}
    with pytest.raises(WeightsMissing, match="PULID_FLUX_FILE"):
        locate(settings.model_copy(update={"flux_file": tmp_path / "no"}), PRESET).path("flux")


def archive(path, folder="antelopev2/"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{folder}det.onnx", DETECTOR)
        file.writestr(f"{folder}rec.onnx", RECOGNISER)
        file.writestr(f"{folder}genderage.onnx", b"not needed")


@pytest.mark.parametrize("folder", ["antelopev2/", ""])
def test_the_nested_zip_is_the_second_choice(settings, shelf, tmp_path, folder):
    """Where the hub has no detector, one zip brings both files, flat, and is gone afterwards."""
    del shelf.files["/o/faces/resolve/main/det.onnx"], shelf.files["/o/faces/resolve/main/rec.onnx"]
    archive(tmp_path / "faces.zip", folder)
    shelf.files["/deep/insight/releases/download/v0.7/faces.zip"] = (tmp_path / "faces.zip").read_bytes()
    bring(settings, shelf)
    assert shelf.count("/deep/insight/releases/download/v0.7/faces.zip") == 1
    assert {path.name for path in (settings.weights_dir / "faces").iterdir()} == {"det.onnx", "rec.onnx"}
    assert set(states(settings).values()) == {"verified"}


def test_a_zip_put_there_by_hand(settings, shelf):
    """Is unpacked without asking a server, and stays."""
    (settings.weights_dir / "faces").mkdir(parents=True)
    archive(settings.weights_dir / "faces" / "faces.zip")
    bring(settings, shelf)
    assert not any("faces" in path for path, _ in shelf.asked)
    assert locate(settings, PRESET).path("recogniser").read_bytes() == RECOGNISER
    assert (settings.weights_dir / "faces" / "faces.zip").exists()


def test_a_full_disk_is_noticed_before(settings, shelf):
    """Nothing is fetched that has no room."""
    huge = ModelSpec("flux", "flux", (ModelFile("f.sft", 10**18),), FREE, "bfl/flux")
    with pytest.raises(WeightsMissing, match=r"need 1000000000\.0 GB"):
        fetch(settings, source=Source(shelf.url), preset=replace(PRESET, specs=(huge,)))
    assert shelf.asked == []


def test_threads_fetch_once(settings, shelf):
    """Four at once: one fetches, the others wait and find everything."""
    failed = []

    def run():
        try:
            bring(settings, shelf)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(shelf.asked) == len(HUB)


def test_processes_fetch_once(settings, shelf):
    """Two processes at once ask for each file once."""
    code = (
        "import pickle, sys; from pipeline.weights import fetch;"
        "fetch(**pickle.loads(bytes.fromhex(sys.argv[1])), accept_licences=True)"
    )
    arguments = {"settings": settings, "source": Source(shelf.url, shelf.url), "preset": PRESET}
    command = [sys.executable, "-c", code, pickle.dumps(arguments).hex()]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(shelf.asked) == len(HUB)


def test_a_miniature_in_a_folder_of_its_own(tmp_path):
    """PULID_MINIATURE_DIR names it; a role that is a folder gives one hash per file, and keeps count of lost ones."""
    root = tmp_path / "mine"
    settings = Settings(miniature_dir=root)
    for name in ("flux/config.json", "flux/model.sft", "pulid/pulid_flux_miniature.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
        Manifest.read(root).record(name, sha256(name.encode()))
    assert set(json.loads((root / "manifest.json").read_text())["files"]["flux/model.sft"]) == {
        *("sha256", "size", "mtime_ns")
    }
    files = locate(settings)
    assert files.path("flux") == root / "flux"
    assert files.hashes("flux", "pulid") == {
        name: sha256(name.encode())
        for name in ("flux/config.json", "flux/model.sft", "pulid/pulid_flux_miniature.safetensors")
    }
    (root / "flux" / "model.sft").unlink()
    with pytest.raises(WeightsMissing, match="PULID_MINIATURE_DIR"):
        files.path("flux")
    assert {finding.file for finding in verify(settings) if finding.state == "missing"} >= {"flux/model.sft", "t5"}


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"a": {"size": 1}}}', '{"files": 3}'])
def test_a_damaged_manifest(settings, text):
    """Is named, with the way out."""
    settings.weights_dir.mkdir()
    (settings.weights_dir / "manifest.json").write_text(text)
    with pytest.raises(WeightsCorrupt, match=r"manifest\.json is not readable"):
        locate(settings, PRESET)


@pytest.fixture
def pulid(settings, monkeypatch):
    """The command `pulid weights`, on the folder of the test."""
    monkeypatch.setenv("PULID_WEIGHTS_DIR", str(settings.weights_dir))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return lambda *arguments, **options: CliRunner().invoke(weights_cli.app, arguments, **options)


def test_list_shows_what_matters(pulid):
    """Role, file, size, licence, commercial use, state; and where a sha256 is not known."""
    result = pulid("list", "--preset", "flux-dev")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert result.exit_code == 0
    for word in ("flux1-dev.safetensors", "23.8 GB", "Non-Commercial, gated", " no ", "missing"):
        assert word in lines["flux"]
    assert "missing, not pinned" in lines["t5"]
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in result.stdout


def test_fetch_asks_for_the_licences(pulid):
    """Without --accept-licences: each licence and its page, and the exit status 1."""
    result = pulid("fetch", "--preset", "flux-krea-dev", "--hub", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "insightface models: non-commercial research only" in result.stderr
    assert "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev" in result.stderr


def test_fetch_explains_a_gate(pulid, settings, shelf):
    """A 403 names the page and the token; HF_TOKEN is passed on and never shown."""
    flux = PRESETS["flux-schnell"].specs[0]
    shelf.status[f"/{flux.repository}/resolve/{flux.revision}/{flux.files[0].name}"] = 403
    for spec in PRESETS["flux-schnell"].specs:  # nearly fetched, so that it works on a small disk too
        for file in spec.files:
            part = settings.weights_dir / spec.folder / f"{file.name}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            os.truncate(part, max(file.room - 1, 0))
    arguments = ("fetch", "--preset", "flux-schnell", "--accept-licences", "--hub", shelf.url)
    result = pulid(*arguments, env={"HF_TOKEN": "hf_secret"})
    assert result.exit_code == 1
    assert "https://huggingface.co/black-forest-labs/FLUX.1-schnell" in result.stderr
    assert shelf.asked[0][1]["authorization"] == "Bearer hf_secret"
    assert "hf_secret" not in result.output


def test_fetch_with_a_bar(settings, shelf, capsys):
    """The bar names each file and its size."""
    source = Source(shelf.url, shelf.url)
    assert weights_cli.fetch_with_bar(settings, PRESET, True, source) == len(HUB)
    assert "f.sft (36.0 kB)" in capsys.readouterr().err


def test_verify_counts_what_is_bad(pulid):
    """Missing files are named, and the exit status is 1."""
    result = pulid("verify", "--preset", "flux-dev")
    assert result.exit_code == 1
    assert "clip/merges.txt" in result.stdout
    assert "23 file(s) are missing or damaged" in result.stderr


def test_the_miniature_needs_no_download(pulid, untrained, monkeypatch):
    """fetch says so; list and verify read its files, which have other times after every checkout."""
    monkeypatch.setenv("PULID_MINIATURE_DIR", str(untrained))
    for path in untrained.rglob("*"):
        os.utime(path, ns=(1, 1))
    for command, told in (("fetch", "comes? with this package"), ("list", str(untrained)), ("verify", "verified")):
        result = pulid(command)
        assert result.exit_code == 0
        assert re.search(told, result.stdout)
        assert not re.search("unverified|missing|corrupt", result.stdout)


def test_a_damaged_miniature_is_told(pulid, untrained, monkeypatch, tmp_path):
    """verify names the file that is not what it was, and what to do."""
    shutil.copytree(untrained, tmp_path / "miniature")
    monkeypatch.setenv("PULID_MINIATURE_DIR", str(tmp_path / "miniature"))
    (tmp_path / "miniature" / "t5" / "config.json").write_text("{}")
    result = pulid("verify")
    assert result.exit_code == 1
    assert re.search(r"corrupt\s+t5/config\.json", result.stdout)
    assert "install this package anew" in result.stderr


def test_a_wrong_preset_is_named(pulid):
    """With the setting to mend, not with a traceback."""
    result = pulid("list", "--preset", "flux-2")
    assert (result.exit_code, "PULID_PRESET" in result.stderr) == (1, True)
