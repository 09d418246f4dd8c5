"""S3Objects: objects in S3 or in any server that speaks its language; every way it fails becomes a StoreError."""

import base64
import hashlib
import logging
import re
from collections.abc import Iterator
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

from pipeline.errors import PipelineError, StoreConflict, StoreCorrupt, StoreMisconfigured, StoreUnavailable
from pipeline.objects import JSON, Entry, Object, checked_key, honours_conditions, overtaken
from pipeline.s3 import s3_client
from pipeline.settings import StoreSettings

LOG = logging.getLogger(__name__)

EXPIRED = "The S3 credentials have expired; renew them and restart the service."
REJECTED = "S3 does not accept the credentials; check the access key, the secret key and the session token."
DENIED = (
    "S3 denies access to bucket {bucket}; allow s3:GetObject, s3:PutObject and s3:DeleteObject on its objects and "
    "s3:ListBucket on it (without that, S3 denies access to what does not exist); with a key of KMS also "
    "kms:GenerateDataKey and kms:Decrypt on that."
)
REGION = "Bucket {bucket} is in another region; set PULID_STORE__REGION to the bucket's own."
CLOCK = "The clocks of this machine and of S3 differ too much; set this machine's clock."
NO_BUCKET = "There is no bucket {bucket}; create it, or correct PULID_STORE__URL."
BAD_NAME = "{bucket} is no name of a bucket; correct PULID_STORE__URL."
BAD_KEY = "KMS cannot use the key that this bucket's objects are encrypted with; check PULID_STORE__KMS_KEY."
LACKING = (
    "The S3 server lacks conditional writes (If-None-Match and If-Match on PutObject) or SHA-256 checksums; use one "
    "that has both."
)
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
MISSING = ("NoSuchKey", "404")  # an answer to HEAD has no body, and so no more than its status
DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch")
LATER = ("IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown", "TooManyRequests")


class _Contended(Exception):
    """Two conditional writes of one key met, and S3 decided neither."""


class _Missing(Exception):
    """There is no object under this key."""


class S3Objects:
    """Objects in a bucket, below a prefix; see pipeline.objects.Objects. The version of an object is its ETag.

    The client is made once: it may be used from several threads.
    """

    def __init__(self, settings: StoreSettings) -> None:
        """Raises StoreMisconfigured; nothing is sent to S3 yet."""
        self._bucket, _, prefix = settings.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._link_seconds = settings.link_seconds
        self._attempts = settings.attempts
        self._encryption: dict[str, str] = {"ServerSideEncryption": settings.encryption} if settings.encryption else {}
        if settings.encryption == "aws:kms" and settings.kms_key:
            self._encryption["SSEKMSKeyId"] = settings.kms_key
        with self._faults():
            self._client = s3_client(settings)

    def check(self) -> None:
        """See Objects: writes, reads, lists and erases as the service will; raises StoreError."""
        if not honours_conditions(self):
            raise StoreMisconfigured(LACKING)

    def create(self, key: str, data: bytes, media_type: str = JSON) -> str:
        """See Objects."""
        return self._write(key, data, media_type, {"IfNoneMatch": "*"})

    def replace(self, key: str, data: bytes, etag: str, media_type: str = JSON) -> str:
        """See Objects."""
        return self._write(key, data, media_type, {"IfMatch": etag})

    def get(self, key: str) -> Object | None:
        """See Objects: checked by botocore against length and checksum."""
        with suppress(_Missing), self._faults():
            answer = self._client.get_object(**self._address(key), ChecksumMode="ENABLED")
            return Object(answer["Body"].read(), answer["ETag"])
        return None

    def delete(self, key: str) -> None:
        """See Objects. In a bucket with versioning S3 keeps what was deleted, until a lifecycle rule removes it."""
        with suppress(_Missing), self._faults():
            self._client.delete_object(**self._address(key))

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Objects. One call for each thousand, when it is come to."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._faults():
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for found in page.get("Contents", ()):
                    yield Entry(found["Key"].removeprefix(self._prefix), found["ETag"])

    def link(self, key: str, media_type: str, file_name: str) -> str | None:
        """See Objects. It lives for `link_seconds`, or until the credentials that signed it expire."""
        parameters = {
            **self._address(key),
            "ResponseContentType": media_type,
            # Never shown as a page of the bucket's own site, whatever the bytes are.
            "ResponseContentDisposition": f'attachment; filename="{file_name}"',
        }
        with self._faults():
            link: str = self._client.generate_presigned_url("get_object", parameters, ExpiresIn=self._link_seconds)
        return link

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def _write(self, key: str, data: bytes, media_type: str, condition: dict[str, str]) -> str:
        for _ in range(self._attempts):
            try:
                return self._put(key, data, media_type, condition)
            except _Contended:
                LOG.info("two writes of one key met; trying again")
            except (StoreConflict, _Missing) as error:
                # An earlier try of ours may have arrived although its answer was lost.
                found = self.get(key)
                if found is not None and found.data == data:
                    return found.etag
                raise overtaken() from error
        raise StoreUnavailable(UNDECIDED)

    def _put(self, key: str, data: bytes, media_type: str, condition: dict[str, str]) -> str:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with self._faults():
            answer = self._client.put_object(
                **self._address(key),
                Body=data,
                ContentType=media_type,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=digest,
                **condition,
                **self._encryption,
            )
        etag: str = answer["ETag"]
        if "ChecksumSHA256" not in answer:  # some servers tell only when asked, some never
            answer = self._head(key)
            if answer.get("ETag") != etag:  # another has written since, over what this call wrote
                return etag
        if answer.get("ChecksumSHA256", digest) != digest or answer.get("ContentLength", len(data)) != len(data):
            raise StoreCorrupt("S3 stored other bytes than were sent; nothing was recorded. Try again.")
        return etag

    def _head(self, key: str) -> dict[str, Any]:
        with suppress(_Missing), self._faults():
            found: dict[str, Any] = self._client.head_object(**self._address(key), ChecksumMode="ENABLED")
            return found
        return {}

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
    if code in MISSING:
        return _Missing("no object has this key")
    if code == "PreconditionFailed" or status == 412:
        return overtaken()
    if code == "ConditionalRequestConflict":
        return _Contended(UNDECIDED)
    if code in DAMAGED:
        return StoreCorrupt("S3 received other bytes than were sent; nothing was recorded. Try again.")
    if code in REFUSALS:
        return StoreMisconfigured(REFUSALS[code].format(bucket=bucket))
    if code.startswith("KMS."):
        return StoreMisconfigured(BAD_KEY)
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
