"""The Studio without a browser: its handlers before a real service, its web server, and how it starts."""

import asyncio
import base64

import httpx
import pytest
from typer.testing import CliRunner

from cluster.cli import app as pulid
from cluster.client import Client
from pipeline.settings import Settings
from tests.fakes import A_FACE
from tests.loopback import HERE, serving
from tests.service import InProcess
from tests.test_client import living

gr = pytest.importorskip("gradio")


@pytest.fixture
def client(tmp_path):
    with living(InProcess(Settings(weights_dir=tmp_path))) as url, Client(url) as client:
        yield client


def test_photos_are_read_once_for_all_clicks(client, tmp_path):
    """What a click on Draw has read is known to the next one, and no identity is left behind by each."""
    from studio.drawing import Drawing
    from studio.form import Form
    from studio.people import People

    (tmp_path / "me.jpg").write_bytes(base64.b64decode(A_FACE))

    async def clicks():
        with gr.Blocks(analytics_enabled=False):
            people, form = People(client), Form(client)
            drawing = Drawing(client, form, people)
        values = {control: control.value for control in form.inputs | people.inputs}
        values |= {control: control.value or "" for control in values if isinstance(control, gr.Textbox)}
        (photos,) = (control for control in people.inputs if isinstance(control, gr.File))
        values[photos] = [str(tmp_path / "me.jpg")]
        for _ in range(2):
            async for updates in drawing._made(values):
                values.update({control: value for control, value in updates.items() if control in values})

    asyncio.run(clicks())
    assert len(client.identities()) == 1


@pytest.mark.parametrize("password", ["", "secret"])
def test_the_page_is_of_this_machine_unless_it_has_a_password(client, password):
    """Other names than this machine's own, and other hosts' pages, reach only the health of a page without one."""
    from studio.app import web

    async def made():  # Gradio leaves an event loop open where there is none
        return web(client, password)

    with serving(asyncio.run(made())) as url:
        strangers = [{"host": "evil.example"}, {"origin": "https://evil.example"}]
        found = [httpx.get(f"{url}/config", headers=headers).status_code for headers in [{}, *strangers]]
        assert found == ([401] * 3 if password else [200, 403, 403])
        assert httpx.get(f"{url}/healthz", headers=strangers[0]).status_code == 200


@pytest.mark.parametrize("password", ["", " ", "\n"])
def test_an_empty_password_is_none(password):
    """Whoever means to set one is told, rather than left with a page that asks for nothing."""
    for host in ("127.0.0.1", "0.0.0.0"):
        words = ["studio", "--server", HERE, "--host", host]
        result = CliRunner().invoke(pulid, words, env={"PULID_STUDIO__PASSWORD": password})
        assert (result.exit_code, "PULID_STUDIO__PASSWORD" in result.stderr) == (1, True)
