"""The S3 client that the store's settings name, for pictures and for s3:// photos alike."""

from typing import Any

from pipeline.errors import StoreMisconfigured
from pipeline.settings import StoreSettings


def s3_client(settings: StoreSettings) -> Any:
    """A boto3 client, with bounded waits and tries; it may be used from several threads.

    Credentials are as boto3 finds them; nothing is sent yet. Raises StoreMisconfigured, and botocore's errors for a
    region, profile or credentials that are incomplete.
    """
    import boto3  # for those who use it
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if settings.path_style else "virtual"},
        connect_timeout=settings.connect_seconds,
        read_timeout=settings.read_seconds,
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
    )
    try:
        # A session of its own: boto3's default one is not safe to make from several threads.
        return boto3.session.Session(region_name=settings.region).client(
            "s3", config=config, endpoint_url=settings.endpoint_url
        )
    except ValueError as error:
        raise StoreMisconfigured("PULID_STORE__ENDPOINT_URL is no address; write it as https://host:port.") from error
