"""People: who is to be drawn: photos that are dropped, or a stored identity; and what was seen in the photos."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from cluster.client import Client
from pipeline.errors import InvalidRequest, PipelineError
from pipeline.request import MAX_NAME, MAX_PHOTOS
from studio.faces import alike, shown
from studio.words import refused, said

SEEN_SECONDS = (
    3600.0  # for which photos are known to the service after they were dropped, as an identity without a name
)
SUFFIXES = [".jpg", ".jpeg", ".png", ".webp"]
NOBODY = ("the photos above", "")
Updates = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """Photos that the service has read: which and how, the identity that they became, and how long it is used."""

    photos: tuple[str, ...]
    face: str
    fusion: str
    identity: str
    until: float  # seconds of time.monotonic

    def of(self, photos: Sequence[str] | None, face: str, fusion: str) -> bool:
        """Whether these are its photos, and the service still knows them."""
        same = (tuple(photos or ()), face, fusion) == (self.photos, self.face, self.fusion)
        return same and time.monotonic() < self.until


class People:
    """The controls, and what happens when they are used. Made where they are to stand in the page."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._photos = gr.File(
            label=f"Photos of one person (1 to {MAX_PHOTOS}); none: anybody", file_count="multiple", file_types=SUFFIXES
        )
        with gr.Row():
            faces = ["largest", "center", "left", "right"]
            self._face = gr.Dropdown(
                faces, value="largest", label="face", info="Of each photo; or a number from the left, from 0.",
                allow_custom_value=True,
            )  # fmt: skip
            self._fusion = gr.Radio(
                ["mean", "concat"], value="mean", label="fusion", info="Several photos averaged, or side by side."
            )
        self._told = gr.HTML()
        self._faces = gr.Gallery(
            label="What the service sees",
            columns=4,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_id="faces",
        )
        with gr.Accordion("Stored identities", open=False):
            self._stored = gr.Dropdown([NOBODY], value="", label="Draw", info="A stored person needs no photos.")
            with gr.Row():
                self._name = gr.Textbox(label="Name", max_length=MAX_NAME, placeholder="to store the photos under")
                self._store = gr.Button("Store")
                self._delete = gr.Button("Delete", variant="stop")
            self._kept = gr.HTML()
        self.seen = gr.State(None)  # what `person` has given last

    @property
    def inputs(self) -> set[Any]:
        """What `person` needs the values of."""
        return {self._photos, self._face, self._fusion, self._stored, self.seen}

    def wire(self) -> None:
        """Say what happens when; inside the page's Blocks, once all of it stands."""
        looked = [self._told, self._faces, self.seen, self._stored]
        hidden: dict[str, Any] = {"api_visibility": "private"}
        gr.on(
            [self._photos.change, self._face.change, self._fusion.change],
            self._look, self.inputs, looked, trigger_mode="always_last", **hidden,
        )  # fmt: skip
        kept = [self._stored, self._kept, self._name]
        self._store.click(self._keep, self.inputs | {self._name}, kept, **hidden)
        self._delete.click(self._erase, {self._stored}, kept, **hidden)

    @property
    def listed(self) -> list[Any]:
        """What `stored` fills."""
        return [self._stored, self._kept]

    async def stored(self) -> Updates:
        """The stored identities, when the page is opened."""
        try:
            return {self._stored: await self._choices("")}
        except PipelineError as error:
            return {self._kept: refused(error)}

    async def person(self, values: Mapping[Any, Any]) -> tuple[dict[str, Any] | None, Seen | None]:
        """Whom a request is to draw, or nobody, and what is known now of the photos; raises PipelineError."""
        seen: Seen | None = values[self.seen]
        if values[self._stored]:
            return {"identity": values[self._stored]}, seen
        if not values[self._photos]:
            return None, seen
        if seen is None or not seen.of(values[self._photos], values[self._face], values[self._fusion]):
            _, seen = await self._read(values)
        return {"identity": seen.identity}, seen

    async def _look(self, values: Mapping[Any, Any]) -> AsyncIterator[Updates]:
        """Photos were dropped, or are to be read in another way: what is in them."""
        photos, before = values[self._photos], values[self.seen]
        blank: Updates = {self._faces: [], self.seen: None, self._stored: ""}
        yield {self._told: said("Looking at the photos.") if photos else "", **blank}
        if before is not None:
            await asyncio.to_thread(self._forget, before)
        if not photos:
            return
        try:
            identity, seen = await self._read(values)
            faces = await asyncio.to_thread(shown, [Path(path).read_bytes() for path in photos], identity["faces"])
        except PipelineError as error:
            yield {self._told: refused(error)}
            return
        words = "A face in every photo." if len(photos) > 1 else "A face."
        yield {self._told: said(words + alike(identity["similarity"])), self._faces: faces, self.seen: seen}

    async def _keep(self, values: Mapping[Any, Any]) -> Updates:
        """Store the person of the photos under a name."""
        name = values[self._name].strip()
        try:
            if not name or not values[self._photos]:
                raise InvalidRequest("To store a person, drop photos above and give a name.")
            identity, _ = await self._read(values, name)
            choices = await self._choices(identity["id"])
        except PipelineError as error:
            return {self._kept: refused(error)}
        return {
            self._stored: choices,
            self._kept: said(f"{name} is stored until {identity['expires'][:10]}."),
            self._name: "",
        }

    async def _erase(self, values: Mapping[Any, Any]) -> Updates:
        """Erase the stored identity that is chosen."""
        try:
            if not values[self._stored]:
                raise InvalidRequest("Choose the stored identity that is to be deleted.")
            await asyncio.to_thread(self._client.remove_identity, values[self._stored])
            return {self._stored: await self._choices(""), self._kept: said("Deleted.")}
        except PipelineError as error:
            return {self._kept: refused(error)}

    async def _choices(self, chosen: str) -> Any:
        identities = await asyncio.to_thread(self._client.identities)
        named = [(_label(identity), identity["id"]) for identity in identities if identity["name"]]
        return gr.Dropdown(choices=[NOBODY, *named], value=chosen)

    async def _read(self, values: Mapping[Any, Any], name: str | None = None) -> tuple[dict[str, Any], Seen]:
        """Have the service read the photos; without a name for as long as they are being used. Raises PipelineError."""
        paths, face, fusion = values[self._photos], values[self._face], values[self._fusion]
        photos = [await asyncio.to_thread(Path(path).read_bytes) for path in paths]
        kept = {"seconds": SEEN_SECONDS} if name is None else {"name": name}
        choice = int(face) if face.isascii() and face.isdecimal() and len(face) < 4 else face
        until = time.monotonic() + SEEN_SECONDS - 60
        identity = await asyncio.to_thread(self._client.add_identity, photos, face=choice, fusion=fusion, **kept)
        return identity, Seen(tuple(paths), face, fusion, identity["id"], until)

    def _forget(self, seen: Seen) -> PipelineError | None:
        """Erase what nobody uses any more; what is in the way of it the service's own expiry outlasts."""
        try:
            self._client.remove_identity(seen.identity)
        except PipelineError as error:
            return error
        return None


def _label(identity: Mapping[str, Any]) -> str:
    return f"{identity['name']} ({len(identity['faces'])} photos, until {identity['expires'][:10]})"
