"""Identities: what a service does with stored identities. Any ingress replica can serve any of them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from deployments.threads import to_its_end
from pipeline.errors import FaceError, PhotoError, PipelineError
from pipeline.faces import Faces
from pipeline.identities import IdentityStore, public
from pipeline.identity import Identity
from pipeline.jobs import new_id
from pipeline.request import NewIdentity, Person, Request


class Stages(Protocol):
    """The two stages that make an identity, wherever they run; each raises PipelineError, and stops when cancelled."""

    async def read_faces(self, person: Person, tenant: str) -> Faces:
        """The faces in a person's photos; their names begin with people[0]."""

    async def encode(self, faces: Faces, fusion: str, tenant: str) -> Identity:
        """The identity of one person."""


class Identities:
    """What a service does with stored identities."""

    def __init__(self, store: IdentityStore, stages: Stages) -> None:
        self._store, self._stages = store, stages

    async def add(self, new: NewIdentity, tenant: str) -> dict[str, Any]:
        """Photos become an identity; returns what its owner is told. Raises PhotoError, FaceError, InvalidRequest.

        Cancelled, it leaves nothing stored.
        """
        self._store.lifetime(new)  # refused before anything is computed, as what follows
        await asyncio.to_thread(self._store.check_room, tenant)
        try:
            faces = await self._stages.read_faces(new.person, tenant)
        except (PhotoError, FaceError) as error:
            raise type(error)(str(error).replace("people[0].", "")) from None  # there are no people in this body
        identity = await self._stages.encode(faces, new.fusion, tenant)
        identity_id = new_id()
        try:
            return public(await to_its_end(self._store.save, identity_id, new, faces, identity, tenant))
        except asyncio.CancelledError:
            with suppress(PipelineError):  # nobody has learnt its id; else it is there until its time is over
                await to_its_end(self._store.delete, identity_id, tenant)
            raise

    async def all(self, tenant: str) -> list[dict[str, Any]]:
        """What a tenant is told of all its identities, the newest first."""
        return [public(record) for record in await asyncio.to_thread(self._store.records, tenant)]

    async def one(self, identity_id: str, tenant: str) -> dict[str, Any]:
        """What a tenant is told of one; raises IdentityNotFound."""
        return public(await asyncio.to_thread(self._store.record, identity_id, tenant))

    async def delete(self, identity_id: str, tenant: str) -> None:
        """Erase one with all that belongs to it; raises IdentityNotFound."""
        await asyncio.to_thread(self._store.delete, identity_id, tenant)

    async def named(self, request: Request, tenant: str) -> Callable[[str, str], Identity]:
        """Read the stored identities that a request names: `stored` of pipeline.flow.Stages, for this request.

        What it cannot give is raised when chain() asks for it, which knows the person's index.
        """
        ids = {person.identity for person in request.people if person.identity is not None}
        loads = (asyncio.to_thread(self._store.load, identity_id, tenant) for identity_id in ids)
        found = dict(zip(ids, await asyncio.gather(*loads, return_exceptions=True), strict=True))

        def stored(identity_id: str, _: str) -> Identity:
            identity = found[identity_id]
            if isinstance(identity, BaseException):
                raise identity
            return identity

        return stored
