"""The Studio in a real browser, before the real service with the miniature: both started by their commands."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from cluster.client import Client
from cluster.local import free_port
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import Scene
from pipeline.miniature.world import draw

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SECONDS = 60_000  # milliseconds that the page may take for anything
PROMPT = "a drawing of a person in a garden"

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs Chromium; CHROMIUM names it"),
]


COMMAND = [sys.executable, "-c", "from cluster.cli import main; main()"]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def command(environment, *words):
    """`pulid` with these words until it says that it is ready; in the end stopped as an operator stops it."""
    process = subprocess.Popen([*COMMAND, *words], env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert any(line.startswith("Ready") for line in process.stdout)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(folder):
    """The address of a service that asks for a key, and a key."""
    port = free_port()
    new = [*COMMAND, "keys", "new", "visitors"]
    key = subprocess.run([*new, "--file", folder / "keys.json"], check=True, capture_output=True, text=True).stdout
    environment = {"PULID_KEYS__FILE": str(folder / "keys.json"), "PULID_STORE__URL": f"file://{folder}/store"}
    with command(environment | {"PULID_DEVICE": "cpu"}, "serve", "--port", str(port)):
        yield f"http://127.0.0.1:{port}", key.strip()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("visitors")


@pytest.fixture(scope="module")
def studio(service, temporary):
    """The address of the page."""
    (server, key), port = service, free_port()
    environment = {"PULID_API_KEY": key, "PULID_STUDIO__SERVER": server, "TMPDIR": str(temporary)}
    with command(environment, "studio", "--port", str(port)) as process:
        yield f"http://127.0.0.1:{port}"
    assert process.returncode == 0
    assert not list(temporary.iterdir())  # photos and pictures do not outlive the page


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.set_default_timeout(SECONDS)
        self.hosts, self.answers = set(), []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("requestfinished", lambda request: self.answers.append(request.response()))
        self.page.goto(address)
        self.button("Draw").wait_for()
        playwright.expect(self.page.get_by_label("number input for width")).to_have_value("256", timeout=SECONDS)

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def drop(self, *photos):
        files = [
            {"name": f"{number}.png", "mimeType": "image/png", "buffer": data} for number, data in enumerate(photos)
        ]
        self.page.locator("input[type=file]").first.set_input_files(files)

    def set(self, name, value):
        field = self.page.get_by_label(f"number input for {name}")
        field.fill(str(value))
        field.blur()

    def says(self, text):
        self.page.get_by_role("status").filter(has_text=re.compile(text)).first.wait_for()

    def refuses(self):
        alert = self.page.get_by_role("alert").locator("visible=true").first
        alert.wait_for()
        return alert.inner_text()

    def pictures(self, where, count):
        """The captions of a gallery that is to hold so many pictures."""
        images = self.page.locator(f"#{where} .grid-wrap img, #{where} button img")
        playwright.expect(images).to_have_count(count, timeout=SECONDS)
        return self.page.locator(f"#{where} .caption-label").all_inner_texts()


@pytest.fixture
def visitor(browser, studio):
    visitor = Visitor(browser, studio)
    yield visitor
    visitor.page.close()


@pytest.fixture(scope="module")
def photo():
    return png(draw(person(FIRST_HELD_OUT), Scene()).pixels)


def test_a_photo_becomes_a_picture(visitor, photo, service):
    """A photo in, its face cut out; a picture out, byte for byte, with all that made it. The key stays away."""
    visitor.drop(photo)
    visitor.says("A face")
    assert "score" in visitor.pictures("faces", 2)[0]
    visitor.page.get_by_label("Prompt", exact=True).fill(PROMPT)
    visitor.page.get_by_label("seed").fill("7")
    visitor.set("num_steps", 8)
    visitor.button("Draw").click()
    visitor.says("Done")
    assert visitor.pictures("pictures", 1) == visitor.pictures("gallery", 1) == ["seed 7"]
    with visitor.page.expect_download() as download:
        visitor.page.get_by_text("Download with all parameters").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        picture, record = (archive.read(name) for name in sorted(archive.namelist()))
    record = json.loads(record)
    with Client(*service) as client:
        assert client.picture(record["id"], 0) == picture
    assert (record["request"]["seed"], record["request"]["prompt"]) == (7, PROMPT)
    assert visitor.hosts == {visitor.page.url.split("/")[2]}  # it works without the internet
    texts = [answer.body().decode(errors="replace") for answer in visitor.answers if "/queue/data" not in answer.url]
    assert any(PROMPT[:9] in text or "PuLID Studio" in text for text in texts)
    assert not any(service[1] in text for text in texts)


def test_an_error_is_a_sentence(visitor):
    """A photo without a face, and a seed that is none: what the service says, and what the page says."""
    visitor.drop(png(np.full((256, 256, 3), 127, np.uint8)))
    assert re.match("Photo 1.* no face.*[.]", visitor.refuses())
    visitor.page.get_by_label("Clear").first.click()
    playwright.expect(visitor.page.get_by_role("alert")).to_have_count(0, timeout=SECONDS)
    visitor.page.get_by_label("seed").fill("seven")
    visitor.button("Draw").click()
    assert visitor.refuses() == "The seed is a whole number from 0; leave it empty for any."


def test_cancel(visitor, service):
    """What is being drawn is shown before it is done, and stops at a click."""
    for name, value in (("width", 1024), ("height", 1024), ("num_steps", 30)):
        visitor.set(name, value)
    visitor.button("Draw").click()
    visitor.says("Step")
    assert visitor.pictures("pictures", 1) == ["a preview"]
    visitor.button("Cancel").click()
    visitor.says("Cancelled")
    visitor.pictures("pictures", 0)
    assert not visitor.button("Cancel").is_enabled()


def test_who_leaves_has_no_further_use_for_a_job(browser, studio, service, folder):
    """When the page is closed, what is being drawn for it is cancelled."""
    visitor = Visitor(browser, studio)
    for name, value in (("width", 1024), ("height", 1024), ("num_steps", 30), ("num_outputs", 4)):
        visitor.set(name, value)
    visitor.button("Draw").click()
    visitor.says("Step")
    job = max((folder / "store" / "jobs" / "visitors").glob("*.json"))  # ids sort by time
    visitor.page.close()
    with Client(*service) as client:
        assert [event.name for event in client.follow(job.stem)][-1] == "cancelled"


def test_weights_are_compared_from_one_seed(visitor, photo):
    """Three pictures side by side, without the identity, with half of it and with all of it; the seed is one."""
    visitor.drop(photo)
    visitor.says("A face")
    visitor.page.get_by_label("seed").fill("11")
    visitor.set("num_steps", 4)
    visitor.button("Compare weights").click()
    captions = [f"id_weight {weight}, seed 11" for weight in ("0", "0.5", "1")]
    playwright.expect(visitor.page.locator("#pictures .caption-label")).to_have_text(captions, timeout=SECONDS)


def test_a_stored_person_needs_no_photos(browser, studio, service, photo):
    """Stored under a name, drawn by it after the page was opened anew, and deleted."""
    first, second = Visitor(browser, studio), Visitor(browser, studio)
    first.drop(photo)
    first.says("A face")
    first.page.get_by_text("Stored identities").click()
    first.page.get_by_label("Name").fill("Ada")
    first.button("Store").click()
    first.says("Ada is stored until")
    first.page.close()
    second.page.reload()
    second.page.get_by_text("Stored identities").click()
    second.page.get_by_label("Draw", exact=True).click()
    second.page.get_by_role("option", name="Ada").click()
    second.set("num_steps", 4)
    second.button("Draw").click()
    second.says("Done")
    with Client(*service) as client:
        (ada,) = (identity for identity in client.identities() if identity["name"] == "Ada")
        second.button("Delete").click()
        second.says("Deleted")
        assert ada not in client.identities()
    second.page.close()


def test_others_need_the_password(studio, service):
    """Where others than this machine reach the page, it asks for a password, and does not start without one."""
    words = ["studio", "--server", service[0], "--host", "0.0.0.0", "--port", str(free_port())]
    refused = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert (refused.returncode, "PULID_STUDIO__PASSWORD" in refused.stderr) == (1, True)
    with command({"PULID_STUDIO__PASSWORD": "secret"}, *words), httpx.Client() as visitor:
        address = f"http://127.0.0.1:{words[-1]}"
        assert visitor.get(f"{address}/config").status_code == 401
        assert visitor.get(f"{address}/healthz").status_code == 200
        visitor.post(f"{address}/login", data={"username": "studio", "password": "secret"}).raise_for_status()
        assert visitor.get(f"{address}/config").status_code == 200
