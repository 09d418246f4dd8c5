import base64
import io
import json
import socket

import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from cluster.demo import astronaut, six_people
from pipeline.settings import Settings


@pytest.fixture
def pulid(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_command_explains_itself(pulid):
    """`pulid --help` names the commands, and each has a help of its own."""
    for command in ("serve", "generate", "demo", "weights", "keys"):
        assert command in pulid("--help").output
        assert pulid(command, "--help").exit_code == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_serving_other_machines_takes_keys(pulid, host):
    """Without API keys only this machine is served, and nothing starts; the message says how to make one."""
    result = pulid("serve", "--host", host)
    assert result.exit_code == 1
    assert "pulid keys new" in result.stderr


def test_serving_from_a_shared_store_takes_keys(pulid):
    """A bucket may hold the pictures of others, so that it is not opened to everybody on this machine."""
    result = pulid("serve", "--store", "s3://ours/pulid")
    assert result.exit_code == 1
    assert "pulid keys new" in result.stderr


def test_a_taken_port_is_told_before_anything_starts(pulid):
    """The message says which option to change."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = pulid("serve", "--port", other.getsockname()[1])
    assert result.exit_code == 1
    assert "--port" in result.stderr


def test_a_store_that_cannot_be_used_is_told_before_anything_starts(pulid, tmp_path):
    """A folder that is a file is refused in one line."""
    (tmp_path / "pictures").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = pulid("serve", "--store", f"file://{tmp_path}/pictures", "--port", port)
    assert result.exit_code == 1
    assert result.stderr.startswith("store_misconfigured: ")


def test_missing_weights_are_told_before_anything_starts(pulid, monkeypatch, tmp_path):
    """A preset whose files are not there names the first one, and starts nothing."""
    monkeypatch.setenv("PULID_WEIGHTS_DIR", str(tmp_path / "empty"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = pulid("serve", "--preset", "flux-dev", "--port", port)
    assert result.exit_code == 1
    assert result.stderr.startswith("weights_missing: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--output", "a.svg"), "--output"),
        (("--output", "a.png", "--num-steps", "0"), "num_steps"),
        (("--output", "a.png", "--width", "300"), "width"),
        (("--output", "a.png", "--id-weight", "1"), "--photo"),
        (("--output", "a.png", "--preset", "flux-max"), "PULID_PRESET"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(pulid, arguments, told):
    """Exit status 1, a code, and what is wrong; no traceback."""
    result = pulid("generate", "--prompt", "portrait", *arguments)
    assert result.exit_code == 1
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_generate_makes_one_picture_with_a_progress_bar(pulid, tmp_path):
    """A photo and a prompt become a file of the asked size and type; the same seed gives the same bytes."""
    (tmp_path / "photo.png").write_bytes(astronaut())
    wish = (
        "--prompt",
        "portrait",
        "--photo",
        "photo.png",
        "--width",
        256,
        "--height",
        256,
        "--num-steps",
        2,
        "--seed",
        3,
    )
    results = [pulid("generate", *wish, "--output", name) for name in ("one.png", "new/two.png")]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    assert "seed 3" in results[0].stdout
    assert "Denoising" in results[0].stderr
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.size, picture.format) == ((256, 256), "PNG")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "new" / "two.png").read_bytes()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_loaded(pulid, tmp_path):
    """A file in the way of the output's folder is one line, not a lost picture."""
    (tmp_path / "taken").touch()
    result = pulid("generate", "--prompt", "portrait", "--output", "taken/a.png")
    assert result.exit_code == 1
    assert "Loading" not in result.stderr
    assert "Traceback" not in result.output


def test_generate_reads_a_request_and_options_win(pulid, tmp_path):
    """A JSON file gives what options do not; each of several pictures gets a file of its own."""
    person = {"photos": [base64.b64encode(astronaut()).decode()], "mask": {"box": [0, 0, 0.5, 1]}}
    body = {"prompt": "two", "people": [person, person], "num_outputs": 2, "width": 256, "height": 256, "num_steps": 9}
    (tmp_path / "request.json").write_text(json.dumps(body))
    result = pulid("generate", "--request", "request.json", "--num-steps", 1, "--seed", 3, "--output", "two.webp")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["two-0.webp (256x256, seed 3)", "two-1.webp (256x256, seed 4)"]
    assert (tmp_path / "two-1.webp").read_bytes().startswith(b"RIFF")


def test_the_demos_real_photos_are_installed():
    """The astronaut comes with scikit-image, the six people with insightface: nothing is fetched."""
    for photo, size, kind in ((astronaut(), (512, 512), "PNG"), (six_people(), (1280, 886), "JPEG")):
        with Image.open(io.BytesIO(photo)) as opened:
            assert (opened.size, opened.format) == (size, kind)


def test_relative_folders_hold_for_other_processes(tmp_path, monkeypatch):
    """Replicas run in other folders, so paths are made absolute here."""
    from cluster.cli import _settings

    monkeypatch.chdir(tmp_path)
    settings = _settings(store__url="file://here", weights_dir="there", miniature_dir="tiny")
    assert settings.store.url == f"file://{tmp_path}/here"
    assert settings.weights_dir == tmp_path / "there"
    assert settings.miniature_dir == tmp_path / "tiny"
    assert settings.flux_file is None
    assert _settings(store__url="s3://bucket/x").store.url == "s3://bucket/x"
    assert isinstance(settings, Settings)
