"""The batch job: JSONL in, pictures in the store, one line per request out."""

import base64
import io
import json
import os
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.jobs import batch, rows, steps
from pipeline import flow
from pipeline.errors import NoFace, SettingsInvalid
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import open_store
from pipeline.trace import Trace

WORDS = "a prompt that no log may hold"


def _write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _source(tmp_path: Path, *lines: str) -> steps.Source:
    settings = Settings.model_validate({"store": {"url": (tmp_path / "pictures").as_uri()}})
    return steps.Source(settings, _write(tmp_path / "requests.jsonl", *lines))


def _works(source: steps.Source) -> list[rows.Work]:
    return [rows.Work(line) for line in rows.index(source.input, source.settings.preset)]


def _through(actor: steps.Actor, work: rows.Work) -> rows.Work:
    done: rows.Work = pickle.loads(actor({"work": pickle.dumps(work)})["work"])
    return done


def _drawn(source: steps.Source) -> steps.Advance:
    """A denoiser that draws nothing: one gray pixel, and the seed of the request."""

    def advance(work: rows.Work) -> rows.Work:
        assert work.request is not None
        data = io.BytesIO()
        Image.new("L", (1, 1)).save(data, "PNG")
        trace = Trace({"denoise": 0.0})
        picture = Picture(data.getvalue(), "image/png", 1, 1, work.request.seed or 0, 1, False, (), trace)
        return replace(work, pictures=(picture,))

    return advance


def test_index_numbers_rows_and_leaves_blank_lines_out(tmp_path: Path) -> None:
    """Every line that is not blank is a row, whatever its end; its bytes are found again by their place in the file."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n   \n{"b": 2}\n\xff\n{"c": 3}')
    lines = rows.index(str(path), "miniature")
    assert [line.row for line in lines] == [0, 1, 2, 3]
    assert [rows.read(str(path), line) for line in lines] == [b'{"a": 1}\r', b'{"b": 2}', b"\xff", b'{"c": 3}']


def test_index_reads_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    """A line may be longer than what is read at a time, and one that begins with a chunk of blanks is still a row."""
    long = b" " * (rows.CHUNK + 5) + b"x" * rows.CHUNK
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"first\n" + long + b"\nlast")
    assert [line.length for line in rows.index(str(path), "miniature")] == [5, len(long), 4]


def test_ids_follow_from_the_content(tmp_path: Path) -> None:
    """A row keeps its id when other rows come and go; equal rows, and other models, have other ids."""
    before = rows.index(_write(tmp_path / "a", "one", "two", "two"), "miniature")
    after = rows.index(_write(tmp_path / "b", "zero", "two", "one"), "miniature")
    assert (after[2].id, after[1].id) == (before[0].id, before[1].id)
    assert len({line.id for line in before + rows.index(str(tmp_path / "a"), "flux-dev")}) == 6
    assert all(len(line.id) == 32 for line in before)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "malformed_body"),
        ("[1]", "malformed_body"),
        ('"' + "\\u0000" * 3 + '"', "malformed_body"),
        ("[" * 5000, "malformed_body"),
        ('{"prompt": ""}', "invalid_request"),
        ('{"prompt": "x", "num_steps": "28"}', "invalid_request"),
        ('{"prompt": "x", "stpes": 1}', "invalid_request"),
        ('{"prompt": "x", "guidance_scale": NaN}', "malformed_body"),
        ('{"prompt": "x", "people": [{"identity": "nobody"}]}', "identity_not_found"),
        ('{"prompt": "' + "x" * 2000 + '"}', "body_too_large"),
    ],
)
def test_a_bad_line_becomes_an_error_row(tmp_path: Path, line: str, code: str) -> None:
    """What the endpoint would refuse is an error row with the same code, and the job goes on."""
    source = _source(tmp_path, line)
    limits = source.settings.limits.model_copy(update={"max_body_bytes": 1024 if code == "body_too_large" else 10**6})
    source = steps.Source(source.settings.model_copy(update={"limits": limits}), source.input)
    result = _through(steps.Actor({"request": steps.request}, source), _works(source)[0]).result
    assert result is not None
    assert result.keys() == {"row", "error"}
    assert result["error"]["code"] == code
    assert result["error"]["detail"]


def test_one_failure_in_a_step_is_one_error_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Foreseen and unforeseen failures alike end in the row, which keeps its id; the log holds no prompt."""
    source = _source(tmp_path, json.dumps({"prompt": WORDS}), json.dumps({"prompt": WORDS}))

    def failing(source: steps.Source) -> steps.Advance:
        def advance(work: rows.Work) -> rows.Work:
            assert work.request is not None
            raise NoFace("There is no face.") if work.line.row == 0 else ValueError(work.request.prompt)

        return advance

    actor = steps.Actor({"request": steps.request, "faces": failing, "denoise": _drawn}, source)
    results = [_through(actor, work).result or {} for work in _works(source)]
    assert [result["error"]["code"] for result in results] == ["no_face", "internal_error"]
    assert all(len(result["id"]) == 32 for result in results)
    assert "ValueError" in caplog.text
    assert WORDS not in caplog.text + json.dumps(results)


def test_a_second_run_answers_from_the_store(tmp_path: Path) -> None:
    """A row whose record is stored is not computed again, and is answered with the same line."""
    source = _source(tmp_path, json.dumps({"prompt": "portrait"}))
    first = steps.Actor({"request": steps.request, "denoise": _drawn, "store": steps.store}, source)

    def unused(source: steps.Source) -> steps.Advance:
        def advance(work: rows.Work) -> rows.Work:
            raise AssertionError("this row was done already")

        return advance

    second = steps.Actor({"request": steps.request, "denoise": unused}, source)
    (work,) = _works(source)
    told = _through(first, work).result
    assert told == _through(second, work).result
    assert told is not None
    assert Path(told["images"][0]["url"].removeprefix("file://")).is_file()


def test_two_runs_at_once_agree(tmp_path: Path) -> None:
    """Where another run stored the row in the meantime, its picture is the answer: it has the same seed."""
    source = _source(tmp_path, json.dumps({"prompt": "portrait"}))
    begun = _through(steps.Actor({"request": steps.request, "denoise": _drawn}, source), _works(source)[0])
    results = [_through(steps.Actor({"store": steps.store}, source), begun).result for _ in range(2)]
    assert results[0] == results[1]
    assert results[0] is not None
    assert "images" in results[0]


def test_the_plan_fits_the_cluster() -> None:
    """One actor of every pool fits at once, on one GPU or several; without GPUs one process does it all."""
    job = batch.Job("in", "out")
    for cluster in ({"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0, "GPU": 4.0}):
        pools = batch.plan(cluster, job)
        assert tuple(name for pool in pools for name in pool.steps) == tuple(steps.STEPS)
        assert sum(pool.cpus for pool in pools) <= cluster["CPU"]
        assert sum(pool.gpus * (pool.actors if "denoise" in pool.steps else 1) for pool in pools) <= cluster.get(
            "GPU", 0
        )
    assert len(batch.plan({"CPU": 8.0}, job)) == 2
    assert len(batch.plan({"CPU": 8.0, "GPU": 1.0}, replace(job, gpus=0))) == 2
    assert any(pool.gpus for pool in batch.plan({"CPU": 8.0}, replace(job, gpus=2)))


@pytest.mark.parametrize("job", [batch.Job("i", "o", gpus=-1), batch.Job("i", "o", detectors=0)])
def test_an_impossible_plan_is_refused(job: batch.Job) -> None:
    """Numbers that make no sense, and a cluster without CPUs, are told before anything starts."""
    with pytest.raises(SettingsInvalid):
        batch.plan({"CPU": 8.0}, job)
    with pytest.raises(SettingsInvalid, match="no CPUs"):
        batch.plan({}, batch.Job("i", "o"))


def test_a_job_that_cannot_begin_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No input, no place for the output, no store, no such preset: one sentence and exit status 1, without Ray."""
    given = _write(tmp_path / "requests.jsonl")
    (tmp_path / "file").write_text("in the way")
    output, store = str(tmp_path / "out"), f"file://{tmp_path}/pictures"
    for arguments, word in (
        (["--input", f"{given}.missing", "--output", output, "--store", store], "--input"),
        (["--input", given, "--output", f"{tmp_path}/none/out", "--store", store], "--output"),
        (["--input", given, "--output", output, "--store", f"file://{tmp_path}/file"], "store"),
        (["--input", given, "--output", output, "--preset", "huge"], "preset"),
    ):
        assert batch.main(arguments) == 1
        assert word in capsys.readouterr().err.lower()
    assert not (tmp_path / "out").exists()


def test_an_empty_input_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without rows gives an empty output."""
    output = tmp_path / "out"
    arguments = ["--input", _write(tmp_path / "in"), "--output", str(output), "--store", f"file://{tmp_path}/pictures"]
    assert batch.main(arguments) == 0
    assert capsys.readouterr().out.endswith("0 pictures, 0 errors\n")
    assert output.read_bytes() == b""


def _free_ports(number: int) -> list[str]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [str(server.getsockname()[1]) for server in taken]
    finally:
        for server in taken:
            server.close()


@pytest.fixture
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """The dashboard's address and the environment of a cluster of our own, guarded by a token, with 2 CPUs."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: names of sockets below it have a limit
    binaries = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PULID_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    flags = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
    )
    flags += ("ray-client-server-port", "runtime-env-agent-port")
    ports = _free_ports(len(flags))
    command = [str(binaries / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=200000000"]
    command += [f"--{flag}={port}" for flag, port in zip(flags, ports, strict=True)]
    with open(f"{folder}/head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{ports[1]}", environment
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # a group of its own; asked kindly, a node first drains for half a minute
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _submit(cluster: tuple[str, dict[str, str]], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the new cluster does not take jobs yet (each try takes seconds itself)."""
    address, environment = cluster
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--", *command]
    for _ in range(20):
        done = subprocess.run(submit, env=environment, text=True, capture_output=True, timeout=240)
        told = done.stdout + done.stderr
        if done.returncode == 0 or not any(word in told for word in ("No available agent", "Failed to connect")):
            break
    return done


def _rows() -> list[str]:
    skimage = pytest.importorskip("skimage.data")

    def photo(pixels: Any) -> str:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG")
        return base64.b64encode(data.getvalue()).decode()

    astronaut, gray = photo(skimage.astronaut()), photo(np.full((256, 256, 3), 127, np.uint8))
    size = {"width": 256, "height": 256, "num_steps": 2}
    found: list[dict[str, Any]] = [{"prompt": f"portrait {number}", **size} for number in range(20)]
    for number in (1, 5, 6, 18):
        found[number]["people"] = [{"photos": [astronaut]}]
    found[5] |= {"seed": 42, "people": [{"photos": [astronaut], "id_weight": 2.0}]}
    found[11]["people"] = [{"photos": [gray]}]
    lines = [json.dumps(row) for row in found]
    lines[3] = lines[3][:-1]
    return lines


@pytest.mark.cluster
def test_twenty_rows_two_of_them_bad(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """`ray job submit` makes 18 pictures and 2 error rows of 20 rows, in order; a picture is the one flow.py makes."""
    given, output, store = _write(tmp_path / "in.jsonl", *_rows()), tmp_path / "out.jsonl", tmp_path / "pictures"
    command = ["python", "-m", "cluster.jobs.batch", "--input", given, "--output", str(output)]
    done = _submit(cluster, *command, "--store", store.as_uri())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 pictures, 2 errors" in done.stdout
    assert "portrait" not in done.stdout + done.stderr

    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["row"] for result in results] == list(range(20))
    assert {r["row"]: r["error"]["code"] for r in results if "error" in r} == {3: "malformed_body", 11: "no_face"}
    pictures = [Path(r["images"][0]["url"].removeprefix("file://")) for r in results if "error" not in r]
    assert len({picture.read_bytes() for picture in pictures}) == 18
    assert not output.with_name("out.jsonl.part").exists()

    settings = Settings.from_environment({}, store__url=store.as_uri())
    request = Request.model_validate_json(_rows()[5])
    (drawn,) = flow.chain(request, flow.load_stages(settings))
    assert open_store(settings.store).content(results[5]["id"], 0).data == drawn.data
