"""API keys: who calls. The file that operators make, and the middleware that asks for a key."""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import problems
from deployments.hosts import is_loopback
from pipeline.errors import KeyInvalid, PipelineError, SettingsInvalid
from pipeline.settings import KeySettings, Settings

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks at the file; a key that was taken out of it works no longer than that
MAX_FILE_BYTES = 1_000_000
MAX_HEADER_BYTES = 512  # of Authorization; a key of ours takes 57 with its scheme
PUBLIC = ("/healthz", "/openapi.json", "/docs")
PUBLIC_BELOW = ("/docs/", "/problems/")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may; without a key file everybody is nobody in particular, without limits."""

    tenant: str = ""
    key: str = field(default="", repr=False)  # the SHA-256 of the key: requests are counted under it
    requests_per_minute: int | None = None
    max_jobs: int | None = None


class Entry(BaseModel):
    """One key in the file. Several may belong to one tenant, so that an old key and its successor overlap.

    A plain SHA-256 is enough: keys are 256 random bits, so there is no dictionary of likely keys to try, which is all
    that a slow hash of passwords defends against.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_jobs: Annotated[int, Field(ge=1)] | None = None
    expires: AwareDatetime | None = None


ENTRIES = TypeAdapter(list[Entry])


def new_key() -> str:
    """A key that nobody can guess: 256 random bits, after a word by which scanners of source code find leaked ones."""
    return f"pulid_{secrets.token_urlsafe(32)}"


def fingerprint(key: str | bytes) -> str:
    """What the file holds in the place of a key: its SHA-256 in hex."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def read_entries(path: Path) -> tuple[tuple[Entry, ...], bytes]:
    """The keys in a file, and its bytes; raises SettingsInvalid, which quotes nothing of it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsInvalid(f"The key file {path} cannot be read ({error.strerror}).") from error
    if len(data) > MAX_FILE_BYTES:
        raise SettingsInvalid(f"The key file {path} has more than {MAX_FILE_BYTES} bytes; is it a key file?")
    try:
        entries = tuple(ENTRIES.validate_json(data, strict=True))
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        # not `from error`: its text quotes the file, where somebody may have put a key in the place of its hash
        raise SettingsInvalid(f"The key file {path} is not as docs/api.md says: {where}: {first['msg']}.") from None
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise SettingsInvalid(f"The key file {path} has one sha256 twice; whose key is it?")
    return entries, data


class KeyFile:
    """The keys of a file that may change at any moment; not for several threads."""

    def __init__(
        self, path: Path, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises SettingsInvalid where the file cannot be used. `wall` and `clock` give seconds."""
        self._path, self._wall, self._clock = path.expanduser(), wall, clock
        self._entries, self._data = read_entries(self._path)
        self._looked, self._trouble = clock(), ""
        if os.stat(self._path).st_mode & 0o022:
            log.warning("The key file %s can be written by others, who could add keys; run chmod go-w.", self._path)

    def caller(self, key: bytes) -> Caller:
        """Whose key this is; raises KeyInvalid."""
        self._look()
        wanted, found = fingerprint(key), None
        for entry in self._entries:  # all of them, in the same time whichever it is
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        if found is None:
            raise KeyInvalid("This API key is not known here; check it, or ask whoever runs this service for one.")
        if found.expires is not None and found.expires.timestamp() <= self._wall():
            raise KeyInvalid("This API key has expired; ask whoever runs this service for a new one.")
        return Caller(found.tenant, found.sha256, found.requests_per_minute, found.max_jobs)

    def _look(self) -> None:
        """Take over what has changed; told by the bytes, as a file that was swapped may have the old one's times."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            entries, data = read_entries(self._path)
        except SettingsInvalid as error:
            if str(error) != self._trouble:
                log.error("%s The keys from before stay in use.", error)
            self._trouble = str(error)
            return
        if data != self._data:
            log.info("The key file %s has changed: %d keys.", self._path, len(entries))
        self._entries, self._data, self._trouble = entries, data, ""


def open_keys(settings: KeySettings) -> KeyFile | None:
    """The key file that the settings name, if any; raises SettingsInvalid where it cannot be used."""
    return None if settings.file is None else KeyFile(settings.file)


def check_exposure(settings: Settings, host: str) -> None:
    """No key is needed on this machine's own address with a local folder; all else raises SettingsInvalid without."""
    if open_keys(settings.keys) is not None:
        return
    if not is_loopback(host):
        wrong = f"Listening on {host} lets other machines in"
    elif not settings.store.url.startswith("file://"):
        wrong = f"{settings.store.url} is a store beyond this machine"
    else:
        return
    raise SettingsInvalid(
        f"{wrong}, which takes API keys, and there are none. Make one with `pulid keys new TENANT --file keys.json`, "
        "and name the file in keys.file (PULID_KEYS__FILE)."
    )


def as_problem(_: Scope, error: PipelineError) -> Response:
    """A refusal in the shape that all our own routes answer in."""
    return problems.response(error, 1)


class Authenticate:
    """ASGI middleware: who calls stands in `scope["state"]["caller"]`, and without a key there is a 401.

    A key is read from `Authorization: Bearer KEY` (or `Token KEY`, as older clients of Replicate send) and from
    nowhere else: addresses get into logs and histories.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyFile | None,
        spend: Callable[[Caller], None],
        refusal: Callable[[Scope, PipelineError], Response] = as_problem,
    ) -> None:
        """`spend` counts one request, and raises RateLimited; `refusal` makes the answer where it or a key fails."""
        self._app, self._keys, self._spend, self._refusal = app, keys, spend, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] == "websocket":  # there is none, and one that is added later has no key
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or _public(scope):
            await self._app(scope, receive, send)
            return
        try:
            caller = Caller() if self._keys is None else self._keys.caller(presented(scope))
            self._spend(caller)
        except PipelineError as error:
            await self._refusal(scope, error)(scope, receive, send)
            return
        await self._app({**scope, "state": {**scope.get("state", {}), "caller": caller}}, receive, send)


def _public(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in PUBLIC or path.startswith(PUBLIC_BELOW)


def presented(scope: Scope) -> bytes:
    """The key that came with a request; raises KeyInvalid where there is not exactly one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if not found:
        raise KeyInvalid("Send an API key, as the header Authorization: Bearer KEY.")
    scheme, _, key = found[0].partition(b" ")
    if len(found) > 1 or len(found[0]) > MAX_HEADER_BYTES or scheme.lower() not in (b"bearer", b"token"):
        raise KeyInvalid("The header Authorization is not understood; send one, as Authorization: Bearer KEY.")
    return bytes(key.strip())
