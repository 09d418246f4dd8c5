"""A service elsewhere, as the commands use it: its address and key as options, and a job of its as a progress bar."""

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import Cancelled
from pipeline.request import Request

if TYPE_CHECKING:
    from cluster.client import Client, JobEvent

KEY = "PULID_API_KEY"
HERE = "http://127.0.0.1:8000"  # where `pulid serve` listens
INTERRUPTED = 130  # the exit status of what Ctrl-C has stopped

KeyFile = Annotated[
    Path | None, typer.Option(help=f"A file with the API key of --server; else {KEY}.", exists=True, dir_okay=False)
]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A picture that came from a service; encoded bytes."""

    data: bytes
    width: int
    height: int
    seed: int


def connected(server: str, key_file: Path | None) -> "Client":
    """A client of a service, with the key of a file or of the environment; raises BadInput."""
    from cluster.client import Client

    key = os.environ.get(KEY, "") if key_file is None else key_file.read_text(errors="replace")
    return Client(server, key.strip())


def made_there(server: str, key_file: Path | None, request: Request) -> Iterator[Made]:
    """The pictures of a request, made by a service while a bar shows how far it is. Ctrl-C stops the job there.

    Raises PipelineError: what the service tells.
    """
    with connected(server, key_file) as client:
        body, key = request.model_dump(mode="json", exclude_unset=True), str(uuid.uuid4())
        job: dict[str, Any] = {}
        try:
            job = client.submit(body, key)
            job = watched(client, job["id"], request.num_outputs)
        except KeyboardInterrupt:
            job = job or client.submit(body, key)  # it may have arrived; the same request under one key is one job
            status = client.cancel(job["id"])["status"]
            print(f"The job {job['id']} is {status}.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        for number, image in enumerate(job["images"]):
            yield Made(client.picture(job["id"], number), image["width"], image["height"], image["seed"])


def watched(client: "Client", job_id: str, pictures: int) -> dict[str, Any]:
    """A job of so many pictures when it has succeeded, with a bar on standard error until then.

    Raises Cancelled, the error that the job failed with, and what the service tells.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from cluster.client import told

    way = Way(pictures)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, closing(client.follow(job_id)) as events:
        # a line of its own: where output goes to a log, bars show only at the end
        bar.console.print(f"Job {job_id}", highlight=False, markup=False)
        task = bar.add_task(way.text, total=None)
        for event in events:
            way.hear(event)
            bar.update(task, description=way.text, completed=way.step, total=way.steps)
    if event.name == "succeeded":
        return dict(event.data)
    if event.name == "failed" and event.data.get("error"):
        raise told(event.data["error"], event.data["error"]["status"])
    raise Cancelled("The job was stopped, and not by this command.")


class Way:
    """How far a job is, from its events.

    text: in words; step of steps: over all its pictures, and None before the first.
    """

    def __init__(self, pictures: int) -> None:
        self.text = "Sent"
        self.steps: int | None = None
        self._pictures, self._done = pictures, dict[int, int]()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return sum(self._done.values())

    def hear(self, event: "JobEvent") -> None:
        """What has happened now."""
        match event.name:
            case "queued":
                self.text = f"Queued at position {event.data['position']}"
            case "started":  # perhaps anew, where a worker was lost
                self.text, self._done = "Started", {}
            case "step":
                self._done[event.data["number"]] = event.data["step"]
                self.steps = event.data["steps"] * self._pictures
                self.text = f"Step {self.step} of {self.steps}"
            case "succeeded":
                self.text = "Done"
