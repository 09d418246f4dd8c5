"""What the commands have in common: errors as one line, and options that were given."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from pipeline.errors import PipelineError


@contextmanager
def told() -> Iterator[None]:
    """Errors as one line and exit status 1."""
    try:
        yield
    except PipelineError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except OSError as error:  # a file that an option names
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(1) from error


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None, by name."""
    return {name: value for name, value in options.items() if value is not None}
