"""`pulid identities`: the people whom a service has stored, to be named in requests in the place of photos."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import given, told
from cluster.remote import HERE, KeyFile, connected

app = typer.Typer(help="The identities that a service has stored: add, list, remove.", no_args_is_help=True)

COLUMNS = ("id", "name", "photos", "fusion", "expires")
DAY = 86_400
Server = Annotated[str, typer.Option(help="The address of the service.")]


@app.command()
def add(  # noqa: PLR0913 - each is an option of the command line
    photos: Annotated[
        list[Path], typer.Argument(help="One to eight photos of one person.", exists=True, dir_okay=False)
    ],
    name: Annotated[str | None, typer.Option(help="A label, for you.")] = None,
    face: Annotated[str | None, typer.Option(help="largest, center, left, right, or a number from the left.")] = None,
    fusion: Annotated[str | None, typer.Option(help="Of several photos: mean or concat.")] = None,
    days: Annotated[float | None, typer.Option(help="After which it is erased; else as the service does.")] = None,
    keep_photos: Annotated[bool, typer.Option("--keep-photos", help="Keep the photos too.")] = False,
    server: Server = HERE,
    key_file: KeyFile = None,
) -> None:
    """Store a person. The id is printed on standard output; `pulid generate --identity ID` draws them."""
    with told(), connected(server, key_file) as client:
        which = int(face) if face is not None and face.isdecimal() else face
        seconds = None if days is None else days * DAY
        fields = given(name=name, face=which, fusion=fusion, seconds=seconds, keep_photos=keep_photos or None)
        identity = client.add_identity([path.read_bytes() for path in photos], **fields)
        for line in described(identity):
            print(line, file=sys.stderr)
        print(identity["id"])


@app.command("list")
def list_identities(server: Server = HERE, key_file: KeyFile = None) -> None:
    """All of yours, the newest first."""
    with told(), connected(server, key_file) as client:
        for line in table(client.identities()):
            print(line)


@app.command()
def remove(
    identity_id: Annotated[str, typer.Argument(metavar="ID")], server: Server = HERE, key_file: KeyFile = None
) -> None:
    """Erase one, with the photos that were kept."""
    with told(), connected(server, key_file) as client:
        client.remove_identity(identity_id)
        print(f"{identity_id} is erased.")


def described(identity: Mapping[str, Any]) -> list[str]:
    """What was found in the photos of an identity, as lines of text."""
    lines = [
        f"photo {face['photo']}: the face at {[round(x) for x in face['box']]}, score {face['score']:.2f}"
        for face in identity["faces"]
    ]
    pairs = [row[column] for number, row in enumerate(identity["similarity"]) for column in range(number)]
    if pairs:
        lines.append(f"least alike are two faces of cosine {min(pairs):.2f}; where that is low, look at the photos")
    return [*lines, f"kept until {identity['expires']}"]


def table(identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """Identities as lines of text with aligned columns."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for one in identities:
        rows.append((one["id"], one["name"] or "", str(len(one["faces"])), one["fusion"], one["expires"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
