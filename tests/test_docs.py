"""What the documentation says exists."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline import errors
from pipeline.request import Mask, Person, Photo, Request
from pipeline.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def settings(model: type[BaseModel] = Settings, prefix: str = "PULID_"):
    for name, field in model.model_fields.items():
        path = f"{prefix}{name.upper()}"
        if isinstance(field.default, BaseModel):
            yield from settings(type(field.default), f"{path}__")
        else:
            default = "null" if field.default is None else "[]" if field.default == () else str(field.default)
            yield path, default


@pytest.mark.parametrize(("name", "default"), list(settings()))
def test_every_setting_is_documented(name, default):
    """docs/settings.md has a row for each setting, with its default."""
    assert re.search(rf"`{name}` \| `{re.escape(default)}` \|", (ROOT / "docs" / "settings.md").read_text())


def test_every_field_is_documented():
    """docs/api.md names each field that a caller can send."""
    text = (ROOT / "docs" / "api.md").read_text()
    for record in (Request, Person, Photo, Mask):
        for field in record.model_fields:
            assert f"`{field}`" in text, f"docs/api.md does not name {record.__name__}.{field}"


def test_every_error_code_is_documented():
    """docs/api.md has a row for each error that a caller can see, with its status."""
    text = (ROOT / "docs" / "api.md").read_text()
    unseen = {"settings_invalid", "licence_not_accepted", "cancelled"}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
    ]
    for kind in kinds:
        if not kind.__subclasses__() and kind.code not in unseen:
            assert f"| {kind.status} | `{kind.code}` |" in text, kind.code


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every relative link in the documentation points at a file that is there."""
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_make_targets_in_the_documentation_exist():
    """Every `make` command that a document names is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        for line in re.findall(r"^make ([a-z -]+)$|`make ([a-z -]+)`", path.read_text(), re.MULTILINE):
            assert set("".join(line).split()) <= targets, line


def test_the_changelog_is_of_this_version():
    """The newest section of CHANGELOG.md is the version in pyproject.toml."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
