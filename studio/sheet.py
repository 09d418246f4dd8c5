"""Sheet: what is known of the jobs of one click, in words and pictures."""

import base64
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.client import JobEvent
from pipeline.errors import PipelineError
from studio.watching import ACCEPTED, Happening
from studio.words import refused, said


@dataclass(slots=True)
class Tile:
    """One job."""

    title: str
    job: dict[str, Any] | None = None  # once it is accepted; once it has succeeded, with its record
    words: str = ""  # HTML
    previews: dict[int, Path] = field(default_factory=dict)  # by the number of the picture
    pictures: list[Path] = field(default_factory=list)
    over: bool = False

    def note(self, happening: Happening, folder: Path) -> None:
        """Something happened to it; previews are written to `folder`, which belongs to this job."""
        if isinstance(happening, PipelineError):
            self.words, self.over = refused(happening), True
            return
        self.words = _words(self.title, happening) or self.words
        self.over = happening.ends
        if happening.ends or happening.name == ACCEPTED:
            self.job = dict(happening.data)
        elif happening.name == "preview":
            number = happening.data["number"]
            self.previews[number] = folder / f"preview-{number}.jpg"
            self.previews[number].write_bytes(base64.b64decode(happening.data["data"]))

    @property
    def succeeded(self) -> bool:
        """Whether it has pictures."""
        return self.over and self.job is not None and self.job["status"] == "succeeded"

    def shown(self) -> list[tuple[str, str]]:
        """Its pictures, or what there is of them yet, as path and words."""
        if not self.over:
            title = f"{self.title}, a preview" if self.title else "a preview"
            return [(str(self.previews[number]), title) for number in sorted(self.previews)]
        images = self.job["images"] if self.job and self.pictures else ()
        titles = (", ".join(filter(None, (self.title, f"seed {image['seed']}"))) for image in images)
        return [(str(path), title) for path, title in zip(self.pictures, titles, strict=True)]


class Sheet:
    """The jobs of one click, each with a title ("" for a single one)."""

    def __init__(self, titles: Sequence[str], folder: Path) -> None:
        self.tiles = [Tile(title, words=said(_titled(title, "Sent."))) for title in titles]
        self._folder = folder

    def note(self, index: int, happening: Happening) -> None:
        """Something happened to a job."""
        self.tiles[index].note(happening, self.folder(index))

    def folder(self, index: int) -> Path:
        """Where the files of a job go."""
        folder = self._folder / str(index)
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def open_jobs(self) -> list[str]:
        """The ids of those that can be cancelled."""
        return [tile.job["id"] for tile in self.tiles if tile.job is not None and not tile.over]

    @property
    def words(self) -> str:
        """HTML."""
        return "".join(tile.words for tile in self.tiles)

    def shown(self) -> list[tuple[str, str]]:
        """Every picture there is, as path and words."""
        return [picture for tile in self.tiles for picture in tile.shown()]

    def archive(self) -> str | None:
        """A zip file of the pictures, and of how each job came about; None without pictures."""
        done = [tile for tile in self.tiles if tile.pictures and tile.job]
        if not done:
            return None
        path = self._folder / "pulid.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:  # pictures do not get smaller
            for tile in done:
                job = tile.job or {}
                for picture in tile.pictures:
                    file.write(picture, f"{job['id']}/{picture.name}")
                file.writestr(f"{job['id']}/record.json", json.dumps(job, indent=2, ensure_ascii=False))
        return str(path)


def _words(title: str, event: JobEvent) -> str | None:
    """An event as HTML; None where it changes nothing that is said."""
    data = event.data
    match event.name:
        case "queued":
            return said(_titled(title, f"Queued, {data['position']} before it."))
        case "started":
            return said(_titled(title, "Begun." if data["attempt"] < 2 else "Begun anew, as a worker was lost."))
        case "step":
            which = f"Picture {data['number'] + 1}, step" if data["number"] else "Step"
            return said(_titled(title, f"{which} {data['step']} of {data['steps']}."), data["step"] / data["steps"])
        case "succeeded":
            return said(_titled(title, f"Done in {data['timings']['total']:.1f} seconds."))
        case "failed":
            return refused(PipelineError(_titled(title, data["error"]["detail"])))
        case "cancelled":
            return said(_titled(title, "Cancelled."))
    return None


def _titled(title: str, text: str) -> str:
    return f"{title}: {text}" if title else text
