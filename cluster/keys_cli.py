"""`pulid keys`: make an API key, and look at a key file. To take a key back, take its entry out of the file."""

import datetime
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import told
from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings

if TYPE_CHECKING:
    from deployments.keys import Entry

app = typer.Typer(help="The API keys: new, list.", no_args_is_help=True)

COLUMNS = ("tenant", "sha256", "requests_per_minute", "max_jobs", "expires")


@app.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whose key it is: small letters, digits and -, at most 32.")],
    file: Annotated[Path | None, typer.Option(help="The key file to add it to; else its entry is printed.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Per ingress replica; else any.")] = None,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Requests and jobs in the making; else any.")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="After which it expires; else never.")] = None,
) -> None:
    """Make a key. It is printed this once, on standard output; the file has its hash only."""
    from pydantic import ValidationError

    from deployments.keys import Entry, fingerprint, new_key

    with told():
        key = new_key()
        ends = days and datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=days)
        limits = {"requests_per_minute": requests_per_minute, "max_jobs": max_jobs, "expires": ends}
        try:
            entry = Entry.model_validate({"tenant": tenant, "sha256": fingerprint(key), **limits})
        except ValidationError as error:
            raise SettingsInvalid("TENANT: small letters, digits and -, at most 32, not - first.") from error
        if file is not None:
            add(file, entry)
        print(key)
        if file is None:
            print(f"The key file takes this entry:\n{_json(entry)}", file=sys.stderr)
        else:
            print(f"{file} has its hash; running services see it within a second.", file=sys.stderr)


@app.command("list")
def list_keys(
    file: Annotated[Path | None, typer.Option(help="The key file; else the one in PULID_KEYS__FILE.")] = None,
) -> None:
    """Every key of a file: whose it is, how its hash begins, what it may, and until when."""
    from deployments.keys import read_entries

    with told():
        path = file or Settings.from_environment().keys.file
        if path is None:
            raise SettingsInvalid("Name the key file: --file, or PULID_KEYS__FILE.")
        for line in table(read_entries(path.expanduser())[0], time.time()):
            print(line)


def table(entries: Sequence["Entry"], now: float) -> list[str]:
    """Keys as lines of text with aligned columns; `now` in seconds since 1970."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for entry in entries:
        ends = entry.expires.isoformat() if entry.expires else "never"
        past = " (expired)" if entry.expires and entry.expires.timestamp() <= now else ""
        limits = (str(limit or "any") for limit in (entry.requests_per_minute, entry.max_jobs))
        rows.append((entry.tenant, entry.sha256[:8], *limits, ends + past))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def add(file: Path, entry: "Entry") -> None:
    """Write a key file anew with one entry more, in one piece; raises SettingsInvalid, or OSError.

    It keeps its owner and mode. A new one can be read by its owner alone. Of several that add at once each waits.
    """
    from deployments.keys import read_entries

    path = file.expanduser().resolve()
    with _locked(path.parent):
        entries = [*(read_entries(path)[0] if path.exists() else ()), entry]
        _write(path, "[\n" + ",\n".join(f"  {_json(one)}" for one in entries) + "\n]\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others who add keys in a folder out; the file itself becomes another with each write."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            if path.exists():
                before = path.stat()
                os.fchown(out.fileno(), before.st_uid, before.st_gid)
                os.fchmod(out.fileno(), before.st_mode & 0o777)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _json(entry: "Entry") -> str:
    return entry.model_dump_json(exclude_none=True)
