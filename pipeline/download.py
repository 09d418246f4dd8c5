"""Download: one file from a server to its place: resumable, checked, atomic.

The bytes go to `<file>.part`; its server's ETag stands beside it in `<file>.part.etag`. A transfer that breaks off goes
on where it stopped, in this run or a later one, as long as the server still has the same file. Under its own name a
file appears only when it is whole, checked and on the disk.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import httpx

from pipeline.errors import LicenceNotAccepted, WeightsCorrupt, WeightsMissing

Progress = Callable[[str, int, int | None], None]  # file name, bytes so far, bytes in all where known

CHUNK = 1 << 20
TIMEOUT = httpx.Timeout(60.0, connect=15.0)
PASSING = (408, 425, 429)  # and every 5xx: worth another try
LINKED_ETAG = "x-linked-etag"  # the hub's own word on a large file's sha256 (huggingface_hub's constants.py)
LONGEST_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to fetch: from where to where, and what is known of it. `page`: where access to a gated one is granted."""

    address: str
    target: Path
    sha256: str | None = None
    size: int | None = None
    token: str | None = field(default=None, repr=False)
    page: str | None = None


class _Again(Exception):
    """This try failed in a way that another one may mend."""


class Downloader:
    """Fetches files one after the other; a context manager. `attempts` per file, with a growing pause between them."""

    def __init__(self, attempts: int = 6, pause: Callable[[float], None] = time.sleep) -> None:
        """`pause` waits for so many seconds."""
        self._attempts = attempts
        self._pause = pause
        self._client = httpx.Client(
            follow_redirects=True,
            timeout=TIMEOUT,
            # A compressed answer's ranges would count compressed bytes.
            headers={"accept-encoding": "identity", "user-agent": "pulid-serve"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def get(self, wanted: Wanted, progress: Progress) -> str:
        """Put the file in its place and return its sha256.

        Raises WeightsMissing (no answer, no such file, no room), WeightsCorrupt, LicenceNotAccepted (gated).
        """
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                self._pause(min(2.0 ** (attempt - 1), LONGEST_PAUSE))
            try:
                wanted.target.parent.mkdir(parents=True, exist_ok=True)
                return self._attempt(wanted, progress)
            except (_Again, httpx.RequestError) as error:
                reason = str(error) or type(error).__name__
            except OSError as error:
                raise WeightsMissing(
                    f"{wanted.target} cannot be written: {error.strerror}. Make room or choose another "
                    "PULID_WEIGHTS_DIR, and fetch again; it goes on where it stopped."
                ) from error
        raise WeightsMissing(
            f"{wanted.target.name} could not be fetched from {httpx.URL(wanted.address).host}: {reason}. Check the "
            "network and fetch again; it goes on where it stopped."
        )

    def _attempt(self, wanted: Wanted, progress: Progress) -> str:
        part, tag, name = _part(wanted.target), _tag(wanted.target), wanted.target.name
        if wanted.sha256 and fetched(wanted.target) == wanted.size:
            return _finish(wanted, _digest(part).hexdigest(), wanted.sha256, joined=True)
        start, headers = _resume(wanted)
        with self._client.stream("GET", wanted.address, headers=headers) as response:
            resumed = _judge(response, wanted, start)
            done = start if resumed else 0
            total = done + int(response.headers["content-length"]) if "content-length" in response.headers else None
            if wanted.size is not None and total not in (None, wanted.size):
                part.unlink(missing_ok=True)
                raise WeightsCorrupt(
                    f"{name} has {total} bytes on the server, not {wanted.size}: it is another file. Do not use it."
                )
            if not resumed:
                part.unlink(missing_ok=True)
                _remember(tag, response.headers.get("etag"))
            digest = _digest(part) if resumed else hashlib.sha256()
            with part.open("ab") as file:
                progress(name, done, total)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(name, done, total)
        if wanted.size is not None and done < wanted.size:
            raise _Again("it broke off")
        return _finish(wanted, digest.hexdigest(), wanted.sha256 or _linked_sha256(response), joined=resumed)


def _finish(wanted: Wanted, digest: str, expected: str | None, joined: bool) -> str:
    """Check a whole file and put it in its place; `joined`: from more than one answer, perhaps of different files."""
    part, tag = _part(wanted.target), _tag(wanted.target)
    tag.unlink(missing_ok=True)
    if expected in (None, digest):
        place(part, wanted.target)
        return digest
    part.unlink()
    if joined:
        raise _Again("what was fetched before does not go with what came now")
    raise WeightsCorrupt(
        f"{wanted.target.name} came with sha256 {digest} instead of {expected}. Nothing was kept. Fetch again; if it "
        "comes like that again, do not use it."
    )


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _tag(target: Path) -> Path:
    return target.with_name(target.name + ".part.etag")


def fetched(target: Path) -> int:
    """The bytes of a file that an earlier transfer left."""
    part = _part(target)
    return part.stat().st_size if part.exists() else 0


def _resume(wanted: Wanted) -> tuple[int, dict[str, str]]:
    """How many bytes there are already, and the headers that ask for the others."""
    headers = {} if wanted.token is None else {"authorization": f"Bearer {wanted.token}"}
    start, tag = fetched(wanted.target), _tag(wanted.target)
    etag = tag.read_text() if tag.exists() else None
    # Without an ETag only a known sha256 can tell whether two halves belong together.
    if start and (etag or wanted.sha256) and (wanted.size is None or start < wanted.size):
        headers["range"] = f"bytes={start}-"
        if etag:
            headers["if-range"] = etag
        return start, headers
    return 0, headers


def _remember(tag: Path, etag: str | None) -> None:
    tag.unlink(missing_ok=True)
    if etag and not etag.startswith("W/"):  # a weak one does not promise the same bytes
        tag.write_text(etag)


def _judge(response: httpx.Response, wanted: Wanted, start: int) -> bool:
    """Whether the answer is the rest of the file (true) or the whole of it (false); raises for every other answer."""
    name, status = wanted.target.name, response.status_code
    if wanted.address.startswith("https:") and response.url.scheme != "https":
        raise WeightsMissing(f"{name} is redirected to an unencrypted address; it was not fetched.")
    if status in (401, 403) and wanted.page is not None:
        raise LicenceNotAccepted(
            f"The server refuses {name} ({status}). Accept its licence at {wanted.page} with your account there, then "
            "pass an access token of that account as --token or HF_TOKEN."
        )
    if status == 416:  # what is here is longer than what is there
        _part(wanted.target).unlink(missing_ok=True)
        raise _Again("the server has fewer bytes than were fetched before")
    if status in PASSING or status >= 500:
        raise _Again(f"it answers {status}")
    if status not in (200, 206) or response.headers.get("content-encoding", "identity") != "identity":
        raise WeightsMissing(f"{wanted.address} gives no file (status {status}); the repository may have moved.")
    if status == 206 and not re.match(rf"bytes {start}-", response.headers.get("content-range", "")):
        _part(wanted.target).unlink(missing_ok=True)
        raise _Again("it sends another part of the file than was asked for")
    return status == 206 and start > 0


def _linked_sha256(response: httpx.Response) -> str | None:
    for answer in (*response.history, response):
        etag = answer.headers.get(LINKED_ETAG, "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", etag):
            return str(etag)
    return None


def _digest(path: Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def sha256(path: Path) -> str:
    """A file's sha256 as hex digits."""
    return _digest(path).hexdigest()


def place(part: Path, target: Path) -> None:
    """Give a finished file its name, at once and for good: after a power cut it is there whole, or not at all."""
    _flush(part)
    os.replace(part, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes and threads, waiting for whoever holds it. Raises WeightsMissing (not writable)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise WeightsMissing(
            f"{path.parent} cannot be written: {error.strerror}. Set PULID_WEIGHTS_DIR to a folder that can."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unpack(archive: Path, folder: Path, expected: Mapping[str, int | None]) -> Iterable[Path]:
    """Write the expected files of a zip, in whatever folder it has them, flat into `folder` as `<name>.part`.

    `expected`: name -> size where known; everything else in the zip is left alone. Raises WeightsCorrupt, also for an
    entry that points out of the zip.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
                    raise WeightsCorrupt(
                        f"{archive.name} holds {entry.filename!r}, which points out of the archive. Do not use it."
                    )
                if path.name in expected and not entry.is_dir():
                    if path.name in found or expected[path.name] not in (None, entry.file_size):
                        raise WeightsCorrupt(
                            f"{archive.name} holds {path.name} twice or of another size; fetch another."
                        )
                    found[path.name] = entry
            if missing := expected.keys() - found.keys():
                raise WeightsCorrupt(f"{archive.name} does not hold {', '.join(sorted(missing))}; fetch another one.")
            for name, entry in found.items():
                # entry.file_size bounds what is read, whatever the compressed bytes say
                with file.open(entry) as source, _part(folder / name).open("wb") as sink:
                    while chunk := source.read(CHUNK):
                        sink.write(chunk)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise WeightsCorrupt(f"{archive.name} is no readable zip: {error}. Remove it and fetch again.") from error
    return [_part(folder / name) for name in found]
