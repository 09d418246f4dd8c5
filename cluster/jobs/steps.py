"""Steps of a batch: the stages of pipeline/ in the order of the way, for actors that hold one or more of them.

A maker loads what its step needs once per actor and returns the function that takes a row one step further. Rows
travel as one column of bytes: our own `Work`, pickled by one step and read by the next, never by anybody else.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.jobs import rows
from cluster.jobs.rows import Line, Work
from deployments.body import parse
from deployments.problems import unforeseen
from pipeline.errors import BodyTooLarge, ImageNotFound, PipelineError, StoreConflict
from pipeline.flow import Stages, chain
from pipeline.settings import Settings
from pipeline.store import open_store


@dataclass(frozen=True, slots=True)
class Source:
    """What every step is made from: the settings, and the address of the input."""

    settings: Settings
    input: str


Advance = Callable[[Work], Work]
Maker = Callable[[Source], Advance]


class Actor:
    """One actor of a pool, for one or more steps; a row that fails stays an error row and goes on to the output."""

    def __init__(self, makers: Mapping[str, Maker], source: Source) -> None:
        self._steps = {name: make(source) for name, make in makers.items()}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take a row of the dataset through these steps."""
        work: Work = pickle.loads(row["work"])
        for name, advance in self._steps.items():
            if work.result is None:
                work = guarded(name, advance, work)
        return {"work": pickle.dumps(work)}


def guarded(name: str, advance: Advance, work: Work) -> Work:
    """One step for one row; whatever it raises becomes the row's own error."""
    try:
        return advance(work)
    except PipelineError as error:
        return replace(work, result=rows.error_result(work, error))
    except Exception as error:  # one row must not end a job of thousands
        told = unforeseen(error, f"Row {work.line.row}, step {name},")
        return replace(work, result=rows.error_result(work, told))


def request(source: Source) -> Advance:
    """A line becomes a Request with a seed, or the stored answer of an earlier run."""
    store, limit = open_store(source.settings.store), source.settings.limits.max_body_bytes

    def advance(work: Work) -> Work:
        if work.line.length > limit:
            raise BodyTooLarge(f"The line has {work.line.length} bytes; send at most {limit}.")
        parsed = parse(rows.read(source.input, work.line))  # by the very rules of the HTTP body
        chain(parsed, Stages(*[lambda *_: None] * 4))  # without models: raises what the way refuses from the start
        if parsed.seed is None:  # from the id, so that a second run draws the same picture; below 2**53
            parsed = parsed.model_copy(update={"seed": int(work.line.id[:13], 16)})
        work = replace(work, request=parsed)
        try:
            return replace(work, result=result(source, work.line, store.record(work.line.id)))
        except ImageNotFound:
            return work

    return advance


def faces(source: Source) -> Advance:
    """The faces of every person; from here on the photos are not needed, and stay behind."""
    from pipeline.faces import FaceDetector

    detector = FaceDetector.load(source.settings)

    def advance(work: Work) -> Work:
        assert work.request is not None
        found = tuple(detector.detect(person, index) for index, person in enumerate(work.request.people))
        return replace(work, faces=found, request=work.request.without_photos())

    return advance


def identity(source: Source) -> Advance:
    """Every person's identity."""
    from pipeline.identity import IdentityEncoder

    encoder = IdentityEncoder.load(source.settings)

    def advance(work: Work) -> Work:
        assert work.request is not None
        people = zip(work.faces, work.request.people, strict=True)
        return replace(work, identities=tuple(encoder.encode(found, person.fusion) for found, person in people))

    return advance


def text(source: Source) -> Advance:
    """The prompt, and the negative prompt where the request uses it."""
    from pipeline.text import TextEncoder

    encoder = TextEncoder.load(source.settings)

    def advance(work: Work) -> Work:
        assert work.request is not None
        wanted, length = work.request, work.request.max_sequence_length
        negative = encoder.encode(wanted.negative_prompt, length) if wanted.uses_true_cfg else None
        return replace(work, text=encoder.encode(wanted.prompt, length), negative=negative)

    return advance


def denoise(source: Source) -> Advance:
    """The pictures."""
    from pipeline.denoise import FluxDenoiser

    denoiser = FluxDenoiser.load(source.settings)

    def advance(work: Work) -> Work:
        assert work.request is not None
        assert work.text is not None
        pictures = tuple(
            denoiser.denoise(work.request, number, work.text, work.negative, *work.identities)
            for number in range(work.request.num_outputs)
        )
        return replace(work, pictures=pictures, faces=(), identities=(), text=None, negative=None)

    return advance


def store(source: Source) -> Advance:
    """The pictures and their record, kept; the row is done."""
    kept = open_store(source.settings.store)

    def advance(work: Work) -> Work:
        assert work.request is not None
        try:
            record = kept.save(work.line.id, work.request, work.pictures).record
        except StoreConflict:  # another run of the same file was faster, with the same picture
            record = kept.record(work.line.id)
        return replace(work, pictures=(), result=result(source, work.line, record))

    return advance


def result(source: Source, line: Line, record: Mapping[str, Any]) -> dict[str, Any]:
    """The output line of a row that became pictures: what `POST /v1/images` answers, with the store's own addresses.

    These do not expire: s3://bucket/prefix/images/{id}/0.png, say. The whole record lies beside the pictures.
    """
    folder = f"{source.settings.store.url.rstrip('/')}/images/{line.id}"
    images = [
        {
            "url": f"{folder}/{picture['file']}",
            **{key: picture[key] for key in ("seed", "width", "height", "media_type")},
        }
        for picture in record["pictures"]
    ]
    told = {name: record[name] for name in ("faces", "prompt_truncated", "timings")}
    return {"row": line.row, "id": line.id, "images": images, **told}


STEPS: Mapping[str, Maker] = {
    "request": request,
    "faces": faces,
    "identity": identity,
    "text": text,
    "denoise": denoise,
    "store": store,
}
