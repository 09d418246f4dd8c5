"""The command `pulid`: serve, generate, identities, demo, weights, keys. It stops what it starts alone."""

import base64
import functools
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import evaluate_cli, identities_cli, keys_cli, studio_cli, weights_cli
from cluster.console import given, told
from cluster.local import check, check_port, free_port, running
from cluster.remote import KeyFile, Made, made_there
from pipeline.errors import InvalidRequest
from pipeline.request import Person, Request
from pipeline.settings import KeySettings, Settings

if TYPE_CHECKING:
    from pipeline.picture import Picture

app = typer.Typer(
    help="A face photo and a prompt become a picture of that person.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they hold prompts and photos
)
app.add_typer(weights_cli.app, name="weights")
app.add_typer(keys_cli.app, name="keys")
app.add_typer(identities_cli.app, name="identities")
app.command()(evaluate_cli.evaluate)
app.command()(studio_cli.studio)

Preset = Annotated[str | None, typer.Option(help="The set of models (PULID_PRESET): miniature, flux-dev, ...")]
FORMATS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


@app.command()
def serve(
    preset: Preset = None,
    store: Annotated[str | None, typer.Option(help="file://folder or s3://bucket/prefix (PULID_STORE__URL)")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Start the service on this machine, until Ctrl-C. Other addresses and stores than this machine's take API keys."""
    from deployments.keys import check_exposure

    with told():
        settings = _settings(preset=preset, store__url=store)
        check_exposure(settings, host)
        check_port(host, port)
        check(settings)
        print(f"Starting with the preset {settings.preset}; pictures go to {settings.store.url}.", flush=True)
        with running(settings, host, port) as url:
            print(f"Ready: {url}/v1/images (Ctrl-C stops it)", flush=True)
            _until_signal()
            print("Stopping.", flush=True)


@app.command()
def generate(  # noqa: PLR0913 - each is an option of the command line
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="A .png, .jpg or .webp file to write.", dir_okay=False)],
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    photo: Annotated[
        list[Path] | None, typer.Option(help="A photo of the person; may be repeated.", exists=True, dir_okay=False)
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(help="A JSON file as for POST /v1/images; options win over it.", exists=True, dir_okay=False),
    ] = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg: float | None = None,
    timestep_to_start_cfg: int | None = None,
    max_sequence_length: int | None = None,
    seed: int | None = None,
    face: Annotated[str | None, typer.Option(help="largest, center, left, right, or a number from the left.")] = None,
    fusion: Annotated[str | None, typer.Option(help="Of several photos: mean or concat.")] = None,
    id_weight: Annotated[float | None, typer.Option(help="How strongly the identity acts.")] = None,
    start_step: Annotated[int | None, typer.Option(help="First step at which it acts.")] = None,
    end_step: Annotated[int | None, typer.Option(help="First step at which it acts no more.")] = None,
    identity: Annotated[
        str | None, typer.Option(help="The id of an identity that --server has, in the place of a --photo.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="The address of a service that is to make them.")] = None,
    key_file: KeyFile = None,
    preset: Preset = None,
) -> None:
    """Make pictures: in this process, or by a service. Options have the names, ranges and defaults of docs/api.md."""
    with told():
        wanted = _request(context.params)
        output.parent.mkdir(parents=True, exist_ok=True)  # now, and not when the picture is finished
        pictures = _made_here(wanted, preset) if server is None else made_there(server, key_file, wanted)
        for number, made in enumerate(pictures):
            path = output if wanted.num_outputs == 1 else output.with_stem(f"{output.stem}-{number}")
            _write(path, made.data)
            print(f"{path} ({made.width}x{made.height}, seed {made.seed})")


def _made_here(wanted: Request, preset: str | None) -> "Iterable[Picture | Made]":
    from pipeline.flow import chain, load_stages

    settings = _settings(preset=preset)
    print(f"Loading the preset {settings.preset}.", file=sys.stderr)
    stages = load_stages(settings)
    steps = wanted.num_steps * wanted.num_outputs
    with typer.progressbar(length=steps, label="Denoising", file=sys.stderr) as bar:
        denoise = functools.partial(stages.denoise, on_step=lambda *_: bar.update(1))
        return chain(wanted, replace(stages, denoise=denoise))


def _request(options: dict[str, Any]) -> Request:
    """The request that options and a JSON file ask for together; raises BadInput."""
    from deployments.body import parsed, validated

    if options["server"] and options["preset"]:
        raise InvalidRequest("--preset is the choice of whoever runs the service; leave it out with --server.")
    for name in ("identity", "key_file"):
        if options[name] and not options["server"]:
            raise InvalidRequest(f"--{name.replace('_', '-')} belongs to a service; give its address as --server.")
    output: Path = options["output"]
    if output.suffix.lower() not in FORMATS:
        raise InvalidRequest("--output: the name has to end in .png, .jpg or .webp.")
    body = parsed(options["request"].read_bytes()) if options["request"] else {}
    body |= given(**{name: options.get(name) for name in Request.model_fields})
    body["output_format"] = FORMATS[output.suffix.lower()]
    person = given(**{name: options.get(name) for name in Person.model_fields})
    if person.get("face", "").isdecimal():
        person["face"] = int(person["face"])
    if options["photo"]:
        if "identity" in person:
            raise InvalidRequest("--identity stands in the place of a --photo; give one of them.")
        body["people"] = [{**person, "photos": [_base64(path.read_bytes()) for path in options["photo"]]}]
    elif "identity" in person:
        body["people"] = [person]
    elif person:
        raise InvalidRequest(
            f"--{next(iter(person)).replace('_', '-')} says how a person is drawn; give a --photo too."
        )
    return validated(body).with_seed()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the picture.", file_okay=False)] = Path(),
    seed: Annotated[int | None, typer.Option(min=0, max=999_999, help="Which person; else any.")] = None,
) -> None:
    """Draw a person who was never seen, send that as the photo, get them in another scene; and find real faces."""
    import httpx

    from cluster.demo import portrait, real_faces

    started = time.perf_counter()
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    with told(), tempfile.TemporaryDirectory(prefix="pulid-demo-") as folder:
        settings = _settings(preset="miniature", store__url=f"file://{folder}")
        settings = settings.model_copy(update={"keys": KeySettings()})  # whatever the environment says: it has no key
        check(settings)
        print("Starting Ray Serve with the preset miniature on this machine.", flush=True)
        with (
            running(settings, "127.0.0.1", free_port()) as url,
            httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
        ):
            print(f"Ready after {time.perf_counter() - started:.0f} s: {url}. Person {seed} is drawn.", flush=True)
            made = portrait(client, seed)
            print(f"Asked for: {made.prompt}")
            for name, boxes in real_faces(client):
                print(f"A photo of {name}: {len(boxes)} face(s) at {[[round(x) for x in box] for box in boxes]}.")
        out.mkdir(parents=True, exist_ok=True)
        path = out.absolute() / "pulid-demo.png"
        _write(path, made.sheet())
        alike = made.likeness(settings)
        found = "not all show a face" if alike is None else f"{alike[0]:.2f} without the photo, {alike[1]:.2f} with it"
        print(f"Likeness to the photo, from -1 to 1 by a recogniser that only judges: {found}.")
        print(f"All stopped after {time.perf_counter() - started:.0f} s. The photo, a picture without it, one with it:")
        print(path)


@app.command()
def memory() -> None:
    """What each memory mode of FLUX.1-dev (PULID_ACCELERATION__MEMORY) keeps on a card; needs no GPU."""
    from pipeline.memory import modes, table

    for line in table(modes()):
        print(line)


def _until_signal() -> None:
    stop = threading.Event()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def _settings(**overrides: Any) -> Settings:
    settings = Settings.from_environment(**given(**overrides))
    # Replicas have working directories of their own.
    kind, _, path = settings.store.url.partition("://")
    url = f"file://{os.path.abspath(os.path.expanduser(path))}" if kind == "file" else settings.store.url
    paths = {name: getattr(settings, name) for name in ("weights_dir", "miniature_dir", "flux_file")}
    here = {name: path and path.expanduser().absolute() for name, path in paths.items()}
    keys = settings.keys.file and settings.keys.file.expanduser().absolute()
    groups = {
        "store": settings.store.model_copy(update={"url": url}),
        "keys": settings.keys.model_copy(update={"file": keys}),
    }
    return settings.model_copy(update={**here, **groups})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def main() -> None:
    """The command."""
    app()
