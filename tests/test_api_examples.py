"""The commands of docs/api.md, run as they stand there: one after the other, in one shell, against the real service."""

import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cluster.local import free_port
from deployments.api import create_api
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import Scene
from pipeline.miniature.world import draw
from pipeline.settings import Settings
from tests.commands import pulid
from tests.service import InProcess

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SERVER = "http://127.0.0.1:8000"
# What a reader would see as the answer's status is written beside the block's number, by curl itself.
CURL = """
curl() { command curl --silent --show-error --write-out '%{stderr}%{http_code}\\n' "$@" 2>> "statuses-$block"; }
"""
SECONDS = 540  # for all commands together


def stated(block):
    """The statuses that the last line of a block tells."""
    return re.search(r"^# ((?:\d{3} ?)+)\n\Z", block, re.MULTILINE)[1].split()


def photo(scene):
    buffer = io.BytesIO()
    Image.fromarray(draw(person(FIRST_HELD_OUT), scene).pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are run: with two photos of a person."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "secret").write_text("a secret of no service but this test's")
    (folder / "me.jpg").write_bytes(photo(Scene()))
    (folder / "me-2.jpg").write_bytes(photo(Scene(light="soft")))
    return folder


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_does_what_the_page_says(folder):
    """Each command is answered with the status that stands below it, and leaves the picture that it names."""
    port = free_port()
    script = [CURL, *(f"block={number}\n{block}" for number, block in enumerate(BLOCKS))]
    environment = {
        "PULID_DEVICE": "cpu",
        "PULID_STORE__URL": f"file://{folder}/store",
        "PULID_WEBHOOKS__SECRET_FILE": str(folder / "secret"),
    }
    with pulid(environment, "serve", "--port", str(port)):
        text = "\n".join(script).replace(SERVER, f"http://127.0.0.1:{port}")
        run = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    found = [(folder / f"statuses-{number}").read_text().split() for number in range(len(BLOCKS))]
    assert found == [stated(block) for block in BLOCKS], run.stderr + run.stdout[-2000:]
    with Image.open(folder / "picture.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (256, 256))


def called(block):
    """The routes that a block calls, as method and path."""
    for line in block.splitlines():
        for words in re.findall(r"(?<!\w)curl ([^|;]*)", line):
            path = re.search(rf"{SERVER}(/[^\s'\"]*)", words)[1]
            method = re.search(r"--request (\w+)", words)
            yield (method[1] if method else "POST" if re.search(r"--(json|form) ", words) else "GET"), path


def test_every_route_has_a_command(tmp_path):
    """Whatever the OpenAPI document describes is called by one of the page's commands."""
    settings = Settings(weights_dir=tmp_path)
    paths = create_api(InProcess(settings), settings).openapi()["paths"]
    routes = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    patterns = {route: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route[1])) + r"\Z") for route in routes}
    calls = [call for block in BLOCKS for call in called(block)]
    missing = {r for r in routes if not any(m == r[0] and patterns[r].match(path) for m, path in calls)}
    assert not missing
