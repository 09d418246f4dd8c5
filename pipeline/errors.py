"""Every way this project fails, as one tree. Catch broadly or narrowly, as you need.

PipelineError                     code, status
├── BadInput                      the caller can mend it: 4xx
│   ├── MalformedBody             400  malformed_body
│   ├── UnsupportedContentType    415  unsupported_content_type
│   ├── BodyTooLarge              413  body_too_large
│   ├── InvalidRequest            422  invalid_request
│   ├── MaskUnreadable            422  mask_unreadable
│   ├── IdentityNotFound          422  identity_not_found
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

from typing import ClassVar


class PipelineError(Exception):
    """The root of everything this project raises on purpose."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500


class BadInput(PipelineError):
    """The request cannot be carried out as it is; its sender can mend it."""

    code = "bad_input"
    status = 400


class MalformedBody(BadInput):
    """The body is not one JSON object."""

    code = "malformed_body"
    status = 400


class UnsupportedContentType(BadInput):
    """The body is not sent as plain application/json."""

    code = "unsupported_content_type"
    status = 415


class BodyTooLarge(BadInput):
    """The body is larger than the service reads."""

    code = "body_too_large"
    status = 413


class InvalidRequest(BadInput):
    """A field is missing, unknown, of the wrong type or out of range.

    `fields` may say which ones: pairs of a field, such as people[0].face, and what is wrong with it.
    """

    code = "invalid_request"
    status = 422
    fields: tuple[tuple[str, str], ...] = ()


class MaskUnreadable(BadInput):
    """A person's mask is not a readable picture."""

    code = "mask_unreadable"
    status = 422


class IdentityNotFound(BadInput):
    """A person names a stored identity that is not there."""

    code = "identity_not_found"
    status = 422


class ImageNotFound(BadInput):
    """No record is stored under this id."""

    code = "image_not_found"
    status = 404


class PhotoError(BadInput):
    """A photo cannot be used."""

    code = "photo_error"
    status = 422


class PhotoUnreadable(PhotoError):
    """A photo is empty, cut off, damaged, or not valid base64."""

    code = "photo_unreadable"


class PhotoTypeUnsupported(PhotoError):
    """A photo is not a JPEG, PNG or WebP picture, whatever its name says."""

    code = "photo_type_unsupported"


class PhotoTooLarge(PhotoError):
    """A photo has too many bytes or pixels."""

    code = "photo_too_large"
    status = 413


class PhotoAddressRefused(PhotoError):
    """A photo's address is one this service does not read from."""

    code = "photo_address_refused"


class PhotoFetchFailed(PhotoError):
    """A photo's address did not give a photo in time."""

    code = "photo_fetch_failed"


class FaceError(BadInput):
    """A photo was read, but the wanted face is not in it."""

    code = "face_error"
    status = 422


class NoFace(FaceError):
    """No face was found in a photo."""

    code = "no_face"


class FaceIndexOutOfRange(FaceError):
    """A person's `face` counts further than there are faces in the photo."""

    code = "face_index_out_of_range"


class Busy(PipelineError):
    """The request is fine; the service has no room or time for it now."""

    code = "busy"
    status = 503


class Overloaded(Busy):
    """Every queue that the request needs is full."""

    code = "overloaded"
    status = 429


class DeadlineExceeded(Busy):
    """The request took longer than the service allows."""

    code = "deadline_exceeded"
    status = 504


class WorkerUnavailable(Busy):
    """A stage has no running worker, or lost the one that had the request."""

    code = "worker_unavailable"


class Cancelled(PipelineError):
    """The caller went away, and the work was stopped."""

    code = "cancelled"
    status = 499


class Fault(PipelineError):
    """Not the caller's doing: ours or the operator's."""

    code = "fault"
    status = 500


class InternalError(Fault):
    """Something failed that nobody foresaw."""

    code = "internal_error"


class PictureInvalid(Fault):
    """The computed picture is not one: it holds NaN or infinities, or is black all over."""

    code = "picture_invalid"


class SettingsInvalid(Fault):
    """A setting or environment variable is unknown or malformed."""

    code = "settings_invalid"


class WeightsError(Fault):
    """The model files cannot be used."""

    code = "weights_error"
    status = 503


class WeightsMissing(WeightsError):
    """A model file is not where it should be."""

    code = "weights_missing"


class WeightsCorrupt(WeightsError):
    """A model file is cut off, altered, or of another model."""

    code = "weights_corrupt"


class LicenceNotAccepted(WeightsError):
    """A model file has a licence that has to be accepted first."""

    code = "licence_not_accepted"


class StoreError(Fault):
    """The picture store failed."""

    code = "store_error"
    status = 503


class StoreUnavailable(StoreError):
    """The store does not answer, or asks to slow down."""

    code = "store_unavailable"


class StoreMisconfigured(StoreError):
    """The store refuses: no such bucket, expired or insufficient credentials, not writable."""

    code = "store_misconfigured"
    status = 500


class StoreConflict(StoreError):
    """Another image is already stored under this id; it stays as it is."""

    code = "store_conflict"
    status = 500


class StoreCorrupt(StoreError):
    """What the store holds is not what was written."""

    code = "store_corrupt"
    status = 500
