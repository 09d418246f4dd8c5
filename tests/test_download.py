"""One file from a real server to its place."""

import io
import random
import zipfile
from dataclasses import replace

import pytest

from pipeline.download import Downloader, Wanted, fetched, unpack
from pipeline.errors import LicenceNotAccepted, WeightsCorrupt, WeightsMissing
from tests.shelf import Shelf, serve, sha256

DATA = random.Random(0).randbytes(300_000)
HALF = 150_000


@pytest.fixture
def shelf():
    with serve(Shelf({"/file": DATA})) as running:
        yield running


@pytest.fixture
def wanted(shelf, tmp_path):
    return Wanted(f"{shelf.url}/file", tmp_path / "models" / "file", sha256(DATA), len(DATA))


def get(wanted, attempts=1, progress=lambda *_: None):
    """Fetch without waiting; returns the sha256 and the pauses that would have been made."""
    pauses = []
    with Downloader(attempts, pauses.append) as downloader:
        return downloader.get(wanted, progress), pauses


def test_a_file_comes_whole(wanted):
    """It is in its place with its sha256 returned, its progress told, and nothing else left behind."""
    steps = []
    assert get(wanted, progress=lambda *step: steps.append(step))[0] == sha256(DATA)
    assert wanted.target.read_bytes() == DATA
    assert [path.name for path in wanted.target.parent.iterdir()] == ["file"]
    assert steps[0] == ("file", 0, len(DATA))
    assert steps[-1] == ("file", len(DATA), len(DATA))


def test_no_final_file_before_it_is_complete(shelf, wanted):
    """Until the last byte is checked there is only the .part file."""
    seen = []
    get(wanted, progress=lambda *_: seen.append(wanted.target.exists()))
    assert len(seen) > 1
    assert not any(seen)
    assert wanted.target.exists()


def test_a_cut_connection_goes_on(shelf, wanted):
    """In the same run, after a pause, without sending again what was there."""
    shelf.cut = [HALF]
    assert get(wanted, attempts=2) == (sha256(DATA), [1.0])
    assert wanted.target.read_bytes() == DATA
    assert shelf.sent == len(DATA)
    assert shelf.asked[1][1]["range"] == f"bytes={HALF}-"
    assert shelf.asked[1][1]["if-range"] == '"one"'


def test_a_later_run_goes_on(shelf, wanted):
    """A run that gives up leaves its bytes to the next one."""
    shelf.cut = [HALF]
    with pytest.raises(WeightsMissing, match="goes on where it stopped"):
        get(wanted)
    assert not wanted.target.exists()
    assert fetched(wanted.target) == HALF
    get(wanted)
    assert wanted.target.read_bytes() == DATA
    assert shelf.sent == len(DATA)


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag_changes": True}])
def test_a_server_that_will_not_go_on(shelf, wanted, change):
    """Without ranges, or with another file by now, it starts again and is right all the same."""
    for name, value in change.items():
        setattr(shelf, name, value)
    shelf.cut = [HALF]
    get(wanted, attempts=2)
    assert wanted.target.read_bytes() == DATA
    assert shelf.sent == HALF + len(DATA)


def test_halves_of_different_files(shelf, wanted):
    """A server without ETags whose file changed meanwhile: the sha256 finds out, and it starts again."""
    shelf.etag = None
    shelf.cut = [HALF]
    shelf.files["/file"] = bytes(len(DATA))
    with pytest.raises(WeightsMissing):
        get(wanted)
    shelf.files["/file"] = DATA
    assert get(wanted, attempts=2)[0] == sha256(DATA)


def test_without_etag_and_sha256_nothing_is_joined(shelf, wanted):
    """Where nothing could tell that two halves belong together, it starts again."""
    shelf.etag = None
    shelf.cut = [HALF]
    get(replace(wanted, sha256=None), attempts=2)
    assert "range" not in shelf.asked[1][1]
    assert wanted.target.read_bytes() == DATA


def test_a_whole_part_needs_no_server(shelf, wanted):
    """A process that died just before the rename left all bytes: they are checked and placed."""
    wanted.target.parent.mkdir()
    wanted.target.with_name("file.part").write_bytes(DATA)
    get(wanted)
    assert (wanted.target.read_bytes(), shelf.asked) == (DATA, [])


def test_a_part_that_is_too_long(shelf, wanted):
    """A leftover longer than the file is thrown away."""
    wanted.target.parent.mkdir()
    wanted.target.with_name("file.part").write_bytes(DATA + b"more")
    get(replace(wanted, size=None), attempts=2)
    assert wanted.target.read_bytes() == DATA


def test_wrong_bytes_are_refused(shelf, wanted):
    """A file with another sha256 is named, and nothing of it is kept."""
    shelf.files["/file"] = bytes(len(DATA))
    with pytest.raises(WeightsCorrupt, match=r"^file came with sha256"):
        get(wanted, attempts=3)
    assert list(wanted.target.parent.iterdir()) == []
    assert len(shelf.asked) == 1


def test_another_size_is_refused_before_the_bytes(shelf, wanted):
    """24 GB of the wrong file are not fetched to find that out."""
    with pytest.raises(WeightsCorrupt, match="300000 bytes on the server"):
        get(replace(wanted, size=5), progress=lambda *_: pytest.fail("it read the body"))
    assert not wanted.target.exists()


def test_the_hubs_own_sha256_counts(shelf, wanted):
    """Where we know no sha256, the one that the hub states is held against the bytes."""
    shelf.linked["/file"] = sha256(b"another file")
    with pytest.raises(WeightsCorrupt):
        get(replace(wanted, sha256=None))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_tried_again(shelf, wanted, status):
    """With growing pauses, a bounded number of times."""
    shelf.status["/file"] = status
    with pytest.raises(WeightsMissing, match=str(status)):
        get(wanted, attempts=4)
    assert len(shelf.asked) == 4


def test_pauses_grow(shelf, wanted):
    """1, 2, 4 ... seconds, at most 30."""
    pauses = []
    with Downloader(8, pauses.append) as downloader, pytest.raises(WeightsMissing):
        downloader.get(replace(wanted, address="http://127.0.0.1:1/file"), lambda *_: None)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gate_says_what_to_do(shelf, wanted, status):
    """A refused gated file names the page and the token; it is not tried again."""
    shelf.status["/file"] = status
    with pytest.raises(LicenceNotAccepted, match=r"https://hub/page .* HF_TOKEN"):
        get(replace(wanted, page="https://hub/page"), attempts=3)
    assert len(shelf.asked) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_a_file_that_is_not_there(shelf, wanted, status):
    """An address without a file is missing at once."""
    shelf.status["/file"] = status
    with pytest.raises(WeightsMissing, match=f"status {status}"):
        get(wanted, attempts=3)
    assert len(shelf.asked) == 1


def test_the_token_stays_with_the_hub(shelf, wanted):
    """A redirect to another server, as the hub does for large files, does not carry the token on."""
    with serve(Shelf({"/blob": DATA})) as other:
        shelf.redirect["/file"] = f"{other.url}/blob"
        get(replace(wanted, token="hf_secret"))
        assert shelf.asked[0][1]["authorization"] == "Bearer hf_secret"
        assert "authorization" not in other.asked[0][1]
    assert "hf_secret" not in repr(replace(wanted, token="hf_secret"))


def test_a_folder_that_cannot_be_written(wanted, tmp_path):
    """Is the disk's fault, and said so."""
    (tmp_path / "models").write_text("a file, not a folder")
    with pytest.raises(WeightsMissing, match="PULID_WEIGHTS_DIR"):
        get(wanted)


def zipped(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def test_a_nested_zip_becomes_flat(tmp_path):
    """Only what is expected comes out, whatever folder it is in."""
    archive = zipped(tmp_path / "a.zip", {"a/a/x.onnx": b"x", "a/y.onnx": b"yy", "a/readme": b"no"})
    parts = unpack(archive, tmp_path, {"x.onnx": 1, "y.onnx": None})
    assert {path.name: path.read_bytes() for path in parts} == {"x.onnx.part": b"x", "y.onnx.part": b"yy"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "x.onnx.part", "y.onnx.part"}


@pytest.mark.parametrize(
    "entries",
    [
        {"../x.onnx": b"x"},
        {"/x.onnx": b"x"},
        {"a\\..\\..\\x.onnx": b"x"},
        {"C:x.onnx": b"x", "x.onnx": b"x"},
        {"a/x.onnx": b"x", "b/x.onnx": b"x"},
        {"x.onnx": b"too long"},
        {"other": b"x"},
    ],
)
def test_a_bad_zip_is_refused(tmp_path, entries):
    """One that points out of itself, holds a file twice, of another size or not at all: nothing is written."""
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(WeightsCorrupt, match=r"a\.zip"):
        unpack(zipped(folder / "a.zip", entries), folder, {"x.onnx": 1})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.zip"]


def test_a_damaged_zip_is_refused(tmp_path):
    """Cut off, or with altered bytes."""
    whole = zipped(tmp_path / "a.zip", {"x.onnx": DATA}).read_bytes()
    for data in (whole[:1000], whole[:5000] + bytes(1000) + whole[6000:], io.BytesIO().getvalue()):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(WeightsCorrupt, match=r"a\.zip"):
            unpack(tmp_path / "a.zip", tmp_path, {"x.onnx": None})
