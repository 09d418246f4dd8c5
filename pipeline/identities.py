"""Stored identities: people whose photos were read once, and whom requests name by an id from then on.

    identities/{tenant}/{id}.json          the record, written last: where it is, the tokens are
    identities/{tenant}/{id}.safetensors   the tokens
    identities/{tenant}/{id}-{n}.photo     photo n as it was sent, where its sender asked for that

Tokens are biometric data: another tenant's are as if they were not there, and so are those whose time is over; nothing
made of a face leaves the store but into the denoiser.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IdentityNotFound, IdentityOutdated, InvalidRequest, StoreCorrupt
from pipeline.faces import FaceBox, Faces
from pipeline.identity import Identity
from pipeline.jobs import begun, moment
from pipeline.objects import Objects, tenant_folder
from pipeline.photos import from_base64
from pipeline.request import NewIdentity
from pipeline.settings import IdentitySettings, Settings
from pipeline.store import open_objects
from pipeline.trace import Trace
from pipeline.weights import locate

log = logging.getLogger(__name__)
VERSION = 1
KIND = "identities"
ID_DIGITS = 32
ID = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")
ROLES = ("detector", "recogniser", "retinaface", "parsing", "eva_clip", "pulid")  # whose files make an identity
PUBLIC = ("id", "name", "created", "expires", "fusion", "faces", "similarity")  # of a record, for its owner
ORPHAN_SECONDS = 3600.0  # far beyond what storing an identity takes; what has no record then never gets one
READS = 16  # records read at a time
MOST = 1000  # of one tenant, so that a listing has an end


class IdentityStore:
    """Identities among a store's objects.

    Every method blocks, may be called from several threads, and raises StoreError.
    """

    def __init__(
        self,
        objects: Objects,
        settings: IdentitySettings,
        models: Callable[[], Mapping[str, str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`models`: names and sha256 of the files that would make an identity now; asked once, when one is needed."""
        self._objects, self._settings, self._clock = objects, settings, clock
        self._models = cache(models)
        self._known_ends: dict[str, float] = {}  # of the records that the last sweep saw; a record never changes

    def lifetime(self, new: NewIdentity) -> float:
        """Seconds for which an identity will be kept; raises InvalidRequest where its caller asks for too many."""
        if new.seconds is None:
            return min(self._settings.seconds, self._settings.max_seconds)
        if new.seconds > self._settings.max_seconds:
            most = f"an identity is kept for at most {self._settings.max_seconds:.0f}"
            error = InvalidRequest(f"The request does not fit: seconds: {most}.")
            error.fields = (("seconds", most),)
            raise error
        return new.seconds

    def check_room(self, tenant: str = "") -> None:
        """Raises InvalidRequest where a tenant has as many identities as it may; the next is then not to be made."""
        if sum(entry.key.endswith(".json") for entry in self._objects.list(_path(tenant))) >= MOST:
            raise InvalidRequest(
                f"There are {MOST} stored identities, the most of one caller; erase some that are old."
            )

    def save(
        self, identity_id: str, new: NewIdentity, faces: Faces, identity: Identity, tenant: str = ""
    ) -> dict[str, Any]:
        """Keep what was made of `new` under an id of pipeline.jobs.new_id; returns its record.

        Raises InvalidRequest as `lifetime` does.
        """
        from safetensors.numpy import save

        created = self._clock()
        expires = created + self.lifetime(new)
        tokens = save({"tokens": np.ascontiguousarray(identity.tokens)})
        kept = new.photos if new.keep_photos else ()
        record = {
            "version": VERSION,
            "id": identity_id,
            "tenant": tenant,
            "name": new.name,
            "created": moment(created),
            "expires": moment(expires),
            "fusion": new.fusion,
            "faces": [_face(box) for box in identity.boxes],
            "similarity": similarity(faces),
            "models": dict(identity.trace.models),
            "sha256": hashlib.sha256(tokens).hexdigest(),
            "photos": len(kept),
        }
        path = _path(tenant, identity_id)
        self._objects.create(f"{path}.safetensors", tokens, "application/octet-stream")
        for number, photo in enumerate(kept):
            data = from_base64(photo.base64 or "", len(photo.base64 or ""))
            self._objects.create(f"{path}-{number}.photo", data, "application/octet-stream")
        self._objects.create(f"{path}.json", json.dumps(record, ensure_ascii=False, allow_nan=False).encode())
        return record

    def record(self, identity_id: str, tenant: str = "") -> dict[str, Any]:
        """What is known about an identity; raises IdentityNotFound, StoreCorrupt."""
        record = self._read(f"{_path(tenant, identity_id)}.json")
        if record is None or _end_of(record) <= self._clock():
            raise not_found()
        return record

    def records(self, tenant: str = "") -> list[dict[str, Any]]:
        """The records of all identities of a tenant, the newest first."""
        keys = [entry.key for entry in self._objects.list(_path(tenant)) if entry.key.endswith(".json")]
        with ThreadPoolExecutor(READS) as threads:
            found = threads.map(self._read, reversed(keys))  # an id begins with its time
            return [record for record in found if record is not None and _end_of(record) > self._clock()]

    def load(self, identity_id: str, tenant: str = "") -> Identity:
        """An identity for the denoiser; raises IdentityNotFound, IdentityOutdated, StoreCorrupt."""
        from safetensors.numpy import load

        started = time.perf_counter()
        record = self.record(identity_id, tenant)
        if record["models"] != self._models():
            raise IdentityOutdated("This identity was made by other models than those in use; store the person anew.")
        found = self._objects.get(f"{_path(tenant, identity_id)}.safetensors")
        if found is None:
            raise not_found()  # erased since its record was read
        if hashlib.sha256(found.data).hexdigest() != record["sha256"]:
            raise StoreCorrupt("A stored identity is damaged; store the person anew.")
        tokens: NDArray[np.float32] = load(found.data)["tokens"]  # (32 * k, 2048)
        boxes = tuple(FaceBox(face["photo"], tuple(face["box"]), face["score"]) for face in record["faces"])
        return Identity(tokens, boxes, Trace({"identity": time.perf_counter() - started}, record["models"]))

    def delete(self, identity_id: str, tenant: str = "") -> None:
        """Erase an identity and all that belongs to it; raises IdentityNotFound."""
        keys = [entry.key for entry in self._objects.list(_path(tenant, identity_id))]
        if not keys:
            raise not_found()
        self._erase(keys)

    def sweep(self) -> int:
        """Erase the identities of all tenants whose time is over, and what never got a record; returns how many."""
        erased, ends = 0, {}
        for path, keys in self._all():
            end = self._end(path, keys)
            if end <= self._clock():
                self._erase(keys)
                erased += 1
            elif f"{path}.json" in keys:
                ends[path] = end
        self._known_ends = ends
        return erased

    def _all(self) -> Iterator[tuple[str, list[str]]]:
        """The objects of each identity, by their common beginning."""
        keys = (entry.key for entry in self._objects.list(f"{KIND}/"))
        for path, group in groupby(keys, lambda key: key[: key.rindex("/") + 1 + ID_DIGITS]):
            if ID.fullmatch(path.rpartition("/")[2]):
                yield path, list(group)

    def _end(self, path: str, keys: list[str]) -> float:
        """When an identity has to go, in seconds since 1970."""
        if f"{path}.json" not in keys:
            return begun(path.rpartition("/")[2]) + ORPHAN_SECONDS
        if path not in self._known_ends:
            try:
                record = self._read(f"{path}.json")
            except StoreCorrupt:
                log.error("%s: the record of an identity is damaged; it is not erased by itself", path)
                return float("inf")
            return 0.0 if record is None else _end_of(record)  # None: erased by another meanwhile
        return self._known_ends[path]

    def _erase(self, keys: list[str]) -> None:
        for key in sorted(keys, key=lambda key: not key.endswith(".json")):  # the record first: nobody finds half of it
            self._objects.delete(key)

    def _read(self, key: str) -> dict[str, Any] | None:
        found = self._objects.get(key)
        if found is None:
            return None
        try:
            record = json.loads(found.data)
            if record["version"] == VERSION and _end_of(record):
                return dict(record)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt("The record of an identity is damaged; store the person anew.") from error
        raise StoreCorrupt("The record of an identity is of another version of this service; store the person anew.")


def open_identities(settings: Settings) -> IdentityStore:
    """The identities of the store that the settings name; nothing is read yet. Raises StoreMisconfigured."""
    return IdentityStore(open_objects(settings.store), settings.identities, partial(models_in_use, settings))


def models_in_use(settings: Settings) -> dict[str, str]:
    """Names and sha256 of the files that make an identity now, without loading them; raises WeightsError."""
    files = locate(settings)
    return files.hashes(*(role for role in ROLES if files.has(role)))


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """What its owner is told of an identity."""
    return {**{key: record[key] for key in PUBLIC}, "photos_kept": record["photos"] > 0}


def similarity(faces: Faces) -> list[list[float]]:
    """How alike the faces are, each to each: the cosine of their ArcFace embeddings, with four decimals."""
    embeddings = np.stack([face.embedding for face in faces.faces]).astype(np.float64)  # (photos, 512)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    found: list[list[float]] = np.round(unit @ unit.T, 4).tolist()
    return found


def not_found() -> IdentityNotFound:
    """The one answer for ids that do not exist, cannot, are another tenant's or are over."""
    return IdentityNotFound("There is no such identity, or its time is over; check its id, or send photos.")


def _path(tenant: str, identity_id: str | None = None) -> str:
    """What the keys of a tenant's identities begin with, or those of one; raises IdentityNotFound."""
    folder = tenant_folder(KIND, tenant)
    if identity_id is not None and ID.fullmatch(identity_id) is None:
        raise not_found()
    return folder if identity_id is None else folder + identity_id


def _end_of(record: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(record["expires"]).timestamp()


def _face(box: FaceBox) -> dict[str, Any]:
    return {"photo": box.photo, "box": [float(edge) for edge in box.box], "score": float(box.score)}
