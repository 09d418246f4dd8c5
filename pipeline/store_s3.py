"""S3Store: pictures in S3 or in any server that speaks its language; every way it fails becomes a StoreError."""

import base64
import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)

from pipeline.errors import (
    ImageNotFound,
    PipelineError,
    StoreConflict,
    StoreCorrupt,
    StoreMisconfigured,
    StoreUnavailable,
)
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.s3 import s3_client
from pipeline.settings import StoreSettings
from pipeline.stored import (
    RECORD,
    Content,
    Stored,
    checked_id,
    conflict,
    describe,
    file_name,
    find_picture,
    from_json,
    not_found,
    to_json,
)

LOG = logging.getLogger(__name__)
NOBODY = "0" * 32  # the id of no image

EXPIRED = "The S3 credentials have expired; renew them and restart the service."
REJECTED = "S3 does not accept the credentials; check the access key, the secret key and the session token."
DENIED = (
    "S3 denies access to bucket {bucket}; allow s3:GetObject and s3:PutObject on its objects and s3:ListBucket on it "
    "(without that, S3 denies access to what does not exist)."
)
REGION = "Bucket {bucket} is in another region; set PULID_STORE__REGION to the bucket's own."
CLOCK = "The clocks of this machine and of S3 differ too much; set this machine's clock."
NO_BUCKET = "There is no bucket {bucket}; create it, or correct PULID_STORE__URL."
BAD_NAME = "{bucket} is no name of a bucket; correct PULID_STORE__URL."
LACKING = "The S3 server lacks conditional writes (If-None-Match) or SHA-256 checksums; use one that has both."
UNDECIDED = "S3 could not decide between two writes of one key; try again."
# Codes of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
REFUSALS = {
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "InvalidAccessKeyId": REJECTED,
    "InvalidToken": REJECTED,
    "SignatureDoesNotMatch": REJECTED,
    "AccessDenied": DENIED,
    "AllAccessDisabled": DENIED,
    "403": DENIED,
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "PermanentRedirect": REGION,
    "301": REGION,
    "RequestExpired": CLOCK,
    "RequestTimeTooSkewed": CLOCK,
    "NoSuchBucket": NO_BUCKET,
    "InvalidBucketName": BAD_NAME,
    "NotImplemented": LACKING,
}
DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch")
LATER = ("IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown", "TooManyRequests")


class _Contended(Exception):
    """Two conditional writes of one key met, and S3 decided neither."""


class S3Store:
    """Pictures in a bucket, below a prefix. The client is made once: it may be used from several threads."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises StoreMisconfigured; nothing is sent to S3 yet."""
        self._bucket, _, prefix = settings.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._link_seconds = settings.link_seconds
        self._attempts = settings.attempts
        with self._faults():
            self._client = s3_client(settings)

    def check(self) -> None:
        """Write, overwrite conditionally and read, as every save will; raises StoreError.

        Leaves one small object, {prefix}check.txt, behind. A server that ignores conditional writes is warned of:
        there, only the randomness of ids keeps two images apart.
        """
        key = f"{self._prefix}check.txt"
        text = b"pulid-serve writes this at every start, to see whether it can.\n"
        self._put(key, text, "text/plain")
        try:
            self._put(key, text, "text/plain", once=True)
        except StoreConflict:
            LOG.debug("the store honours conditional writes")
        else:
            LOG.warning("the S3 server ignores conditional writes (If-None-Match); images could be overwritten")
        with suppress(ImageNotFound):  # the right answer; a store without the right to list says 403 instead
            self.record(NOBODY)

    def save(self, image_id: str, request: Request, pictures: Sequence[Picture]) -> Stored:
        """Write every picture, then the record: each verified by its checksum, none ever overwritten.

        A presigned link lives for `link_seconds`, or until the credentials that signed it expire.
        """
        started = time.perf_counter()
        for number, picture in enumerate(pictures):
            key = self._key(image_id, file_name(number, picture.media_type))
            self._put_once(key, picture.data, picture.media_type)
        record = describe(image_id, request, pictures, time.perf_counter() - started)
        self._put_once(self._key(image_id, RECORD), to_json(record), "application/json")
        links = tuple(self._link(image_id, number, picture.media_type) for number, picture in enumerate(pictures))
        return Stored(image_id, links, record)

    def record(self, image_id: str) -> Mapping[str, Any]:
        """The record of an image; raises ImageNotFound, StoreError."""
        return from_json(self._get(self._key(image_id, RECORD)), image_id)

    def content(self, image_id: str, number: int) -> Content:
        """A presigned link to a picture; raises ImageNotFound, StoreError."""
        media_type = find_picture(self.record(image_id), number)["media_type"]
        return Content(media_type, link=self._link(image_id, number, media_type))

    def _key(self, image_id: str, name: str) -> str:
        return f"{self._prefix}images/{checked_id(image_id)}/{name}"

    def _put(self, key: str, data: bytes, media_type: str, once: bool = False) -> None:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        condition = {"IfNoneMatch": "*"} if once else {}
        with self._faults():
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=data,
                ContentType=media_type,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=digest,
                **condition,
            )
            if "ChecksumSHA256" not in answer:  # some servers tell only when asked, some never
                answer = self._client.head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        if answer.get("ChecksumSHA256", digest) != digest or answer.get("ContentLength", len(data)) != len(data):
            raise StoreCorrupt("S3 stored other bytes than were sent; nothing was recorded. Try again.")

    def _put_once(self, key: str, data: bytes, media_type: str) -> None:
        """Write where nothing is; raises StoreConflict where something else is."""
        for _ in range(self._attempts):
            try:
                return self._put(key, data, media_type, once=True)
            except _Contended:
                LOG.info("two writes of one key met; trying again")
            except StoreConflict:
                # An earlier attempt of ours may have arrived although its answer was lost.
                if self._get(key) == data:
                    return None
                raise
        raise StoreUnavailable(UNDECIDED)

    def _get(self, key: str) -> bytes:
        with self._faults():
            answer = self._client.get_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
            data: bytes = answer["Body"].read()  # checked by botocore against length and checksum
        return data

    def _link(self, image_id: str, number: int, media_type: str) -> str:
        name = file_name(number, media_type)
        parameters = {
            "Bucket": self._bucket,
            "Key": self._key(image_id, name),
            "ResponseContentType": media_type,
            # Never shown as a page of the bucket's own site, whatever the bytes are.
            "ResponseContentDisposition": f'attachment; filename="{image_id}-{name}"',
        }
        with self._faults():
            link: str = self._client.generate_presigned_url("get_object", parameters, ExpiresIn=self._link_seconds)
        return link

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _answered(error, self._bucket) from error
        except BotoCoreError as error:
            raise _unanswered(error) from error


def _answered(error: ClientError, bucket: str) -> Exception:
    """What an answer of S3 that is an error means."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchKey":
        return not_found()
    if code == "PreconditionFailed" or status == 412:
        return conflict()
    if code == "ConditionalRequestConflict":
        return _Contended(UNDECIDED)
    if code in DAMAGED:
        return StoreCorrupt("S3 received other bytes than were sent; nothing was recorded. Try again.")
    if code in REFUSALS:
        return StoreMisconfigured(REFUSALS[code].format(bucket=bucket))
    if status >= 500 or status == 429 or code in LATER:
        return StoreUnavailable("S3 is overloaded or failing; try again later.")
    name = code if re.fullmatch(r"\w{1,64}", code) else "without a code"
    return StoreMisconfigured(f"S3 refused the call ({name}); check the settings PULID_STORE__*.")


def _unanswered(error: BotoCoreError) -> PipelineError:
    """What it means that botocore could not send a call, or could not read its answer."""
    match error:
        case ChecksumError() | FlexibleChecksumError():
            return StoreCorrupt("S3 sent other bytes than were stored; make the image again.")
        case SSLError():
            return StoreMisconfigured("The S3 server's certificate is not valid here; check PULID_STORE__ENDPOINT_URL.")
        case ConnectionError() | HTTPClientError() | IncompleteReadError():
            return StoreUnavailable(
                "S3 does not answer, or not in time; try again, or check PULID_STORE__ENDPOINT_URL and "
                "PULID_STORE__PATH_STYLE."
            )
        case NoCredentialsError() | PartialCredentialsError() | ProfileNotFound():
            return StoreMisconfigured(
                "There are no complete credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
                "this machine a role."
            )
        case NoRegionError():
            return StoreMisconfigured("No region is set for S3; set PULID_STORE__REGION.")
    return StoreMisconfigured(
        f"S3 cannot be called with these settings ({type(error).__name__}); check PULID_STORE__* and the credentials."
    )
