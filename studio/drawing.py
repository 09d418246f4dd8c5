"""Drawing: what happens from a click on Draw or Compare to the pictures, the download and the gallery."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from cluster.client import Client, JobEvent
from pipeline.errors import PipelineError
from studio.form import Form
from studio.people import People
from studio.sheet import Sheet, Tile
from studio.watching import Happening, Watch, stop
from studio.words import refused, said

WEIGHTS = (0.0, 0.5, 1.0)  # of a comparison
SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
MOST_KEPT = 60  # pictures in the gallery
Updates = dict[Any, Any]


class Drawing:
    """The controls, and what happens when they are used. Made where they are to stand in the page."""

    def __init__(self, client: Client, form: Form, people: People) -> None:
        self._client, self._form, self._people = client, form, people
        with gr.Row():
            self._draw = gr.Button("Draw", variant="primary")
            self._compare = gr.Button("Compare weights")
            self._cancel = gr.Button("Cancel", variant="stop", interactive=False)
        gr.Markdown("Compare draws from one seed without the identity, and with id_weight 0.5 and 1.")
        self._told = gr.HTML()
        self._pictures = gr.Gallery(
            label="Pictures", columns=3, object_fit="contain", interactive=False, elem_id="pictures"
        )
        self._download = gr.DownloadButton("Download with all parameters", interactive=False)
        self._gallery = gr.Gallery(
            label="Made since this page was opened",
            columns=6,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            interactive=False,
            elem_id="gallery",
        )
        self._open_jobs = gr.State([])

    def wire(self) -> None:
        """Say what happens when; inside the page's Blocks, once all of it stands."""
        inputs = self._form.inputs | self._people.inputs
        outputs = [self._told, self._pictures, self._cancel, self._download, self._open_jobs, self._people.seen]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for button, handler in ((self._draw, self._made), (self._compare, partial(self._made, weights=WEIGHTS))):
            made = button.click(handler, inputs, outputs, **hidden)
            made.then(_gathered, [self._pictures, self._gallery], self._gallery, **hidden)
        self._cancel.click(self._stop, self._open_jobs, [self._told, self._cancel], **hidden)

    async def _made(self, values: Mapping[Any, Any], weights: Sequence[float] = ()) -> AsyncIterator[Updates]:
        """What the form says, drawn once; or with each of some id_weights, from one seed."""
        yield {
            self._told: said("Sent."),
            self._pictures: [],
            self._download: gr.DownloadButton(value=None, interactive=False),
        }
        try:
            who, seen = await self._people.person(values)
            yield {self._people.seen: seen}  # or the photos would be read anew at each click
            body = self._form.body(values, who)
        except PipelineError as error:
            yield {self._told: refused(error)}
            return
        titles = [f"id_weight {weight:g}" for weight in weights] or [""]
        bodies = compared(body, weights) or [body]
        with (
            tempfile.TemporaryDirectory(prefix="pulid-studio-") as folder,  # Gradio copies what is shown
            Watch(self._client, bodies) as jobs,
        ):
            sheet = Sheet(titles, Path(folder))
            async for index, happening in jobs.news():
                sheet.note(index, happening)
                yield await self._updates(sheet, index, happening)
            archive = await asyncio.to_thread(sheet.archive)
            yield {
                self._pictures: sheet.shown(),
                self._download: gr.DownloadButton(value=archive, interactive=archive is not None),
            }

    async def _updates(self, sheet: Sheet, index: int, happening: Happening) -> Updates:
        """What the page shows after something happened to a job."""
        tile = sheet.tiles[index]
        if tile.succeeded:
            try:
                tile.pictures = await asyncio.to_thread(self._fetch, tile, sheet.folder(index))
            except PipelineError as error:
                tile.words = refused(error)
        updates: Updates = {
            self._told: sheet.words,
            self._open_jobs: sheet.open_jobs,
            self._cancel: gr.Button(interactive=bool(sheet.open_jobs)),
        }
        changed = tile.over or (isinstance(happening, JobEvent) and happening.name == "preview")
        return updates | ({self._pictures: sheet.shown()} if changed else {})

    def _fetch(self, tile: Tile, folder: Path) -> list[Path]:
        """The pictures of a job that has succeeded, byte for byte, as files; raises PipelineError."""
        job, paths = tile.job or {}, []
        for number, image in enumerate(job["images"]):
            paths.append(folder / f"{number}.{SUFFIXES[image['media_type']]}")
            paths[-1].write_bytes(self._client.picture(job["id"], number))
        return paths

    async def _stop(self, open_jobs: Sequence[str]) -> Updates:
        """Cancel what is being drawn; that it was, the jobs' own events tell."""
        failures = await asyncio.gather(*(asyncio.to_thread(stop, self._client, job) for job in open_jobs))
        refusals = [refused(error) for error in failures if error is not None]
        return {self._cancel: gr.Button(interactive=False)} | ({self._told: "".join(refusals)} if refusals else {})


def compared(body: Mapping[str, Any], weights: Sequence[float]) -> list[dict[str, Any]]:
    """One request per id_weight, each of one picture and from the same seed."""
    return [
        {**body, "num_outputs": 1, "people": [{**one, "id_weight": weight} for one in body["people"]]}
        for weight in weights
    ]


def _gathered(pictures: list[Any] | None, gallery: list[Any] | None) -> list[Any]:
    """The gallery with what was just made, first."""
    return [*(pictures or ()), *(gallery or ())][:MOST_KEPT]
