"""Settings: one frozen tree, built once; the only reader of the environment.

`PULID_PRESET=flux-dev`, `PULID_STORE__URL=s3://bucket/prefix`: two underscores go one level down. An unknown or
malformed variable is an error that names it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import SettingsInvalid

PREFIX = "PULID_"
# read by `pulid` as a client of a service; no settings of ours
CLIENTS = ("PULID_API_KEY", "PULID_STUDIO__SERVER", "PULID_STUDIO__PASSWORD")
PresetName = Literal["miniature", "flux-dev", "flux-krea-dev", "flux-schnell"]

MemoryMode = Literal["resident", "lean", "cast", "gguf", "nf4"]


class Group(BaseModel):
    """A closed, frozen group of settings; errors name a setting and never quote what it was set to."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class StoreSettings(Group):
    """Where pictures and their records are kept."""

    url: str = Field("file://pictures", description="file://folder, or s3://bucket/prefix")
    endpoint_url: str | None = Field(None, description="an S3-compatible server other than AWS")
    region: str | None = Field(None, description="the bucket's region; null: as boto3 finds it")
    path_style: bool = Field(False, description="address the bucket in the path, as most S3-compatible servers want")
    link_seconds: int = Field(3600, ge=1, le=604800, description="lifetime of a presigned link")
    connect_seconds: float = Field(5.0, gt=0, description="time to connect to S3")
    read_seconds: float = Field(20.0, gt=0, description="time to wait for S3's answer")
    attempts: int = Field(3, ge=1, le=10, description="tries of one call to S3, the first included")
    encryption: Literal["", "AES256", "aws:kms"] = Field("", description="asked of S3 for all it keeps; empty: its own")
    kms_key: str | None = Field(None, description="the key of aws:kms; null: the bucket's own")

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not value.startswith(("file://", "s3://")) or value in ("file://", "s3://"):
            raise ValueError("must be file://folder or s3://bucket/prefix")
        return value


class PhotoSettings(Group):
    """What is accepted as a photo, and from where."""

    max_bytes: int = Field(20_000_000, ge=1, description="bytes of one photo, decoded from base64")
    max_pixels: int = Field(50_000_000, ge=1, description="width times height of one photo")
    long_edge: int = Field(1024, ge=64, description="larger photos are scaled down to this; 1024 is the official value")
    buckets: tuple[str, ...] = Field((), description="buckets that s3:// photos may come from")
    urls: bool = Field(True, description="whether https:// photos are fetched at all")
    fetch_seconds: float = Field(10.0, gt=0, description="time for one photo's whole fetch, redirects included")
    max_redirects: int = Field(3, ge=0, description="redirects followed, each checked like the first address")


class LimitSettings(Group):
    """What one request may cost."""

    max_body_bytes: int = Field(32_000_000, ge=1024, description="bytes of a request's body, JSON or a form")
    max_requests: int = Field(
        32, ge=1, description="requests with a body that one ingress replica has in hand; four times as many wait"
    )
    request_seconds: float = Field(300.0, gt=0, description="from a request's arrival to its answer; then 504")
    retry_after_seconds: int = Field(5, ge=1, description="the Retry-After of a 429")


class CacheSettings(Group):
    """What replicas remember of inputs they have seen; biometric data never outlives its seconds."""

    identity_bytes: int = Field(64_000_000, ge=0, description="faces and identities in one replica; 0: none are kept")
    tenant_bytes: int = Field(16_000_000, ge=0, description="of these, the most that one named tenant's may take")
    identity_seconds: float = Field(3600.0, gt=0, description="after which a face or an identity is forgotten")
    prompt_bytes: int = Field(256_000_000, ge=0, description="encoded prompts in one replica; 0: none are kept")
    prompt_seconds: float = Field(86400.0, gt=0, description="after which an encoded prompt is forgotten")


class EngineSettings(Group):
    """How one FluxDenoiser serves many pictures at once."""

    max_jobs: int = Field(16, ge=1, description="pictures in one replica, waiting ones included")
    max_rows: int | None = Field(
        None, ge=1, description="pictures in one forward pass; 1: each as if alone, to the bit; null: by memory mode"
    )
    sizes: tuple[Annotated[str, Field(pattern=r"^\d+x\d+$")], ...] = Field(
        (), description="WIDTHxHEIGHT whose seconds per step are measured at start-up; empty: the usual ones"
    )
    folded_bytes: int | None = Field(
        None, ge=0, description="folded identities kept on the device; null: by memory mode"
    )
    modulation: Literal["auto", "live", "table", "host"] = Field(
        "auto", description="computed in each step, or once per picture, with its weights on the device or the host"
    )
    preview_steps: int = Field(4, ge=0, description="a preview after every so many steps; 0: none")
    step_seconds: float = Field(
        60.0, gt=0, description="a step or decoding that takes longer hangs, and its replica is replaced"
    )


class AccelerationSettings(Group):
    """How FLUX runs on its GPUs."""

    compile: Literal["auto", "off", "regional", "whole"] = Field(
        "auto", description="torch.compile: each block, or all of FLUX; auto: regional on a GPU where it can be"
    )
    attention: str = Field("native", pattern=r"^[a-z0-9_]+$", description="diffusers' name of an attention backend")
    fp8: bool = Field(False, description="row-wise float8 in the blocks' linear layers, through torchao")
    step_cache: float = Field(0.0, ge=0, lt=1, description="threshold of the first-block cache; 0: every step is whole")
    context_parallel: int = Field(1, ge=1, le=8, description="GPUs that share the tokens of one picture")
    vae_channels_last: bool = Field(False, description="the autoencoder's convolutions in channels_last")
    memory: MemoryMode = Field("resident", description="what stays on the card; docs/settings.md has the table")


class KeySettings(Group):
    """Who may use the service."""

    file: Path | None = Field(None, description="the hashed API keys, one tenant each; null: no key is asked for")


class JobSettings(Group):
    """Work that goes on without its caller."""

    max_open: int = Field(1000, ge=1, description="jobs that are queued or running, of everybody; then 429")
    max_running: int = Field(16, ge=1, description="jobs in the making in one ingress replica")
    lease_seconds: float = Field(15.0, gt=0, description="without a heartbeat for so long, a job is taken over")
    scan_seconds: float = Field(1.0, gt=0, description="between two looks for jobs that nobody runs")
    attempts: int = Field(5, ge=1, description="tries of a job whose workers were lost; then it fails")
    deadline_seconds: float = Field(86400.0, gt=0, description="for a job that names none; waiting included")
    wait_seconds: float = Field(60.0, gt=0, description="the longest that `Prefer: wait=N` waits")
    replay_seconds: float = Field(86400.0, gt=0, description="for which an Idempotency-Key is remembered")


class WebhookSettings(Group):
    """Telling callers that their job has come further."""

    secret_file: Path | None = Field(
        None, description="webhooks are signed with keys made of its content; null: none are sent"
    )
    seconds: float = Field(10.0, gt=0, description="time for one delivery")
    attempts: int = Field(5, ge=1, le=20, description="tries of one delivery, the first included")


class IdentitySettings(Group):
    """Stored identities."""

    seconds: float = Field(
        2_592_000.0, gt=0, description="after which an identity is erased, where its caller says none"
    )
    max_seconds: float = Field(31_536_000.0, gt=0, description="the longest that a caller may ask for")


class Settings(Group):
    """Everything that can be set."""

    preset: PresetName = Field("miniature", description="the set of models")
    weights_dir: Path = Field(Path("~/.cache/pulid-serve"), description="the folder of model files")
    miniature_dir: Path | None = Field(
        None, description="the miniature from here, freshly trained say; null: the one in this package"
    )
    flux_file: Path | None = Field(
        None, description="FLUX from here: a diffusers folder, flux1-*.safetensors, or an fp8 single file"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: the GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the large models; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    store: StoreSettings = StoreSettings()
    photos: PhotoSettings = PhotoSettings()
    limits: LimitSettings = LimitSettings()
    cache: CacheSettings = CacheSettings()
    engine: EngineSettings = EngineSettings()
    acceleration: AccelerationSettings = AccelerationSettings()
    keys: KeySettings = KeySettings()
    jobs: JobSettings = JobSettings()
    webhooks: WebhookSettings = WebhookSettings()
    identities: IdentitySettings = IdentitySettings()

    @property
    def max_rows(self) -> int:
        """Pictures in one forward pass: as set, or what the memory mode has room for.

        One where steps are skipped, as each row decides for itself which.
        """
        if self.acceleration.step_cache:
            return 1
        usual = 8 if self.acceleration.memory == "resident" else 1
        return usual if self.engine.max_rows is None else self.engine.max_rows

    @property
    def folded_bytes(self) -> int:
        """Bytes of folded identities on the device: as set, or what the memory mode has room for: one photo's."""
        usual = 1_000_000_000 if self.acceleration.memory == "resident" else 130_000_000
        return usual if self.engine.folded_bytes is None else self.engine.folded_bytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Read `PULID_*` variables; `overrides` (a flag of the command line, say) win over them.

        Raises SettingsInvalid, naming the variable or setting.
        """
        found = os.environ if environment is None else environment
        tree: dict[str, Any] = {}
        for name, text in found.items():
            if name.startswith(PREFIX) and name not in CLIENTS:
                _put(tree, name.removeprefix(PREFIX).lower().split("__"), text, name)
        for path, value in overrides.items():
            _put(tree, path.split("__"), value, path)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            path = "__".join(str(part) for part in first["loc"])
            raise SettingsInvalid(f"{PREFIX}{path.upper()} (setting {path}): {first['msg']}") from error


def _put(tree: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsInvalid(f"{name} goes below a setting that is a single value")
    if isinstance(value, str) and value[:1] in ("[", "{"):  # lists are written as JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SettingsInvalid(f"{name} looks like JSON but is not: {error}") from error
    tree[path[-1]] = value
