"""Every way this project fails, as one tree. Catch broadly or narrowly, as you need.

PipelineError                     code, status
├── BadInput                      the caller can mend it: 4xx
│   ├── MalformedBody             400  malformed_body
│   ├── KeyInvalid                401  key_invalid
│   ├── HostRefused               403  host_refused
│   ├── UnsupportedContentType    415  unsupported_content_type
│   ├── BodyTooLarge              413  body_too_large
│   ├── InvalidRequest            422  invalid_request
│   ├── MaskUnreadable            422  mask_unreadable
│   ├── IdempotencyConflict       422  idempotency_conflict
│   ├── WebhookRefused            422  webhook_refused
│   ├── IdentityNotFound          422  identity_not_found
│   ├── IdentityOutdated          422  identity_outdated
│   ├── ImageNotFound             404  image_not_found
│   ├── PhotoError
│   │   ├── PhotoUnreadable       422  photo_unreadable
│   │   ├── PhotoTypeUnsupported  422  photo_type_unsupported
│   │   ├── PhotoTooLarge         413  photo_too_large
│   │   ├── PhotoAddressRefused   422  photo_address_refused
│   │   └── PhotoFetchFailed      422  photo_fetch_failed
│   └── FaceError
│       ├── NoFace                422  no_face
│       └── FaceIndexOutOfRange   422  face_index_out_of_range
├── Busy                          try again later
│   ├── Overloaded                429  overloaded
│   ├── RateLimited               429  rate_limited
│   ├── DeadlineExceeded          504  deadline_exceeded
│   └── WorkerUnavailable         503  worker_unavailable
├── Cancelled                     499  cancelled
└── Fault                         ours or the operator's: 5xx, logged with an id
    ├── InternalError             500  internal_error
    ├── PictureInvalid            500  picture_invalid
    ├── SettingsInvalid           500  settings_invalid
    ├── WeightsError
    │   ├── WeightsMissing        503  weights_missing
    │   ├── WeightsCorrupt        503  weights_corrupt
    │   └── LicenceNotAccepted    503  licence_not_accepted
    └── StoreError
        ├── StoreUnavailable      503  store_unavailable
        ├── StoreMisconfigured    500  store_misconfigured
        ├── StoreConflict         500  store_conflict
        └── StoreCorrupt          500  store_corrupt

Constructors take one message, a sentence that says what to do: an exception with a signature of its own does not
survive the way from one replica to another. `code` is for programs, the message for people; neither ever holds a
prompt, a photo, a key or an embedding.
"""

import re
from typing import ClassVar


class PipelineError(Exception):
    """The root of everything this project raises on purpose."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init_subclass__(cls) -> None:
        """The code of an error is its name: NoFace is no_face."""
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class BadInput(PipelineError):
    """The request cannot be carried out as it is; its sender can mend it."""

    status = 400


class MalformedBody(BadInput):
    """The body is not one JSON object."""

    status = 400


class KeyInvalid(BadInput):
    """There is no API key with the request, or none that is known here."""

    status = 401


class HostRefused(BadInput):
    """A service without API keys was called by another name than this machine's own, or from another host's page."""

    status = 403


class UnsupportedContentType(BadInput):
    """The body is of a type that is not read here, is compressed, or says it has another charset than UTF-8."""

    status = 415


class BodyTooLarge(BadInput):
    """The body is larger than the service reads."""

    status = 413


class InvalidRequest(BadInput):
    """A field is missing, unknown, of the wrong type or out of range.

    `fields` may say which ones: pairs of a field, such as people[0].face, and what is wrong with it.
    """

    status = 422
    fields: tuple[tuple[str, str], ...] = ()


class MaskUnreadable(BadInput):
    """A person's mask is not a readable picture."""

    status = 422


class IdempotencyConflict(BadInput):
    """The Idempotency-Key came before, with another request."""

    status = 422


class WebhookRefused(BadInput):
    """A webhook's address is one that this service does not send to, or it sends no webhooks."""

    status = 422


class IdentityNotFound(BadInput):
    """A person names a stored identity that is not there."""

    status = 422


class IdentityOutdated(BadInput):
    """A stored identity was made by other models than those that draw now; make it anew from photos."""

    status = 422


class ImageNotFound(BadInput):
    """No record is stored under this id."""

    status = 404


class PhotoError(BadInput):
    """A photo cannot be used."""

    status = 422


class PhotoUnreadable(PhotoError):
    """A photo is empty, cut off, damaged, or not valid base64."""


class PhotoTypeUnsupported(PhotoError):
    """A photo is not a JPEG, PNG or WebP picture, whatever its name says."""


class PhotoTooLarge(PhotoError):
    """A photo has too many bytes or pixels."""

    status = 413


class PhotoAddressRefused(PhotoError):
    """A photo's address is one this service does not read from."""


class PhotoFetchFailed(PhotoError):
    """A photo's address did not give a photo in time."""


class FaceError(BadInput):
    """A photo was read, but the wanted face is not in it."""

    status = 422


class NoFace(FaceError):
    """No face was found in a photo."""


class FaceIndexOutOfRange(FaceError):
    """A person's `face` counts further than there are faces in the photo."""


class Busy(PipelineError):
    """The request is fine; the service has no room or time for it now."""

    status = 503


class Overloaded(Busy):
    """Every queue that the request needs is full."""

    status = 429


class RateLimited(Busy):
    """An API key has sent more requests than it may, or has as many in the making as it may.

    `retry_after` seconds from now there is room again.
    """

    status = 429
    retry_after: int = 1


class DeadlineExceeded(Busy):
    """The request took longer than the service allows."""

    status = 504


class WorkerUnavailable(Busy):
    """A stage has no running worker, or lost the one that had the request."""


class Cancelled(PipelineError):
    """The caller went away, and the work was stopped."""

    status = 499


class Fault(PipelineError):
    """Not the caller's doing: ours or the operator's."""

    status = 500


class InternalError(Fault):
    """Something failed that nobody foresaw."""


class PictureInvalid(Fault):
    """The computed picture is not one: it holds NaN or infinities, or is black all over."""


class SettingsInvalid(Fault):
    """A setting or environment variable is unknown or malformed."""


class WeightsError(Fault):
    """The model files cannot be used."""

    status = 503


class WeightsMissing(WeightsError):
    """A model file is not where it should be."""


class WeightsCorrupt(WeightsError):
    """A model file is cut off, altered, or of another model."""


class LicenceNotAccepted(WeightsError):
    """A model file has a licence that has to be accepted first."""


class StoreError(Fault):
    """The picture store failed."""

    status = 503


class StoreUnavailable(StoreError):
    """The store does not answer, or asks to slow down."""


class StoreMisconfigured(StoreError):
    """The store refuses: no such bucket, expired or insufficient credentials, not writable."""

    status = 500


class StoreConflict(StoreError):
    """Another image is already stored under this id; it stays as it is."""

    status = 500


class StoreCorrupt(StoreError):
    """What the store holds is not what was written."""

    status = 500
