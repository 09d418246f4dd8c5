"""The page, and the web server of it."""

import gradio as gr
from fastapi import FastAPI

from cluster.client import Client
from deployments.hosts import OwnHost
from deployments.keys import as_problem
from pipeline.settings import PhotoSettings
from studio.drawing import Drawing
from studio.form import Form
from studio.people import People

CACHE_SECONDS = (600, 4 * 3600)  # how often old files are looked for, and how old they are
CSS = ".refused { color: #b00020; font-weight: 600 } footer { display: none }"
USER = "studio"  # who logs in, where there is a password


def page(client: Client) -> gr.Blocks:
    """The page over one service. What a visitor has done is in the visitor's own session."""
    blocks = gr.Blocks(title="PuLID Studio", analytics_enabled=False, delete_cache=CACHE_SECONDS)
    with blocks:
        gr.Markdown("# PuLID Studio\nA face photo and a prompt become a picture of that person.")
        with gr.Row():
            with gr.Column():
                people = People(client)
                form = Form(client)
            with gr.Column():
                drawing = Drawing(client, form, people)
        people.wire()
        drawing.wire()
        blocks.load(people.stored, None, people.listed, api_visibility="private")
        blocks.load(form.suited, None, form.sizes, api_visibility="private")
    # Every visitor's events go on beside each other: they wait for the service, which has bounds of its own.
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def web(client: Client, password: str = "") -> FastAPI:
    """The page as an ASGI application, and GET /healthz beside it.

    `password`: asked of visitors, as user "studio"; without one everybody who reaches the page from this machine, and
    not through another host's page, may use it.
    """
    app = FastAPI(openapi_url=None)
    if not password:
        app.add_middleware(OwnHost, refusal=as_problem)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Whether the page is there; the service behind it has an address of its own for that."""
        return {"status": "ok"}

    gr.mount_gradio_app(
        app,
        page(client),
        path="/",
        auth=(USER, password) if password else None,
        max_file_size=PhotoSettings().max_bytes,
        footer_links=[],
        run_history=False,  # else the browser would keep photos and prompts
        show_error=False,
        ssr_mode=False,
        pwa=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return app
