import pytest
from pydantic import ValidationError

from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings


def test_defaults_need_no_environment():
    """Without variables it is the miniature and a local folder."""
    settings = Settings.from_environment({})
    assert settings.preset == "miniature"
    assert settings.store.url == "file://pictures"


def test_variables_and_overrides():
    """Two underscores go one level down; lists are JSON; an override wins over a variable."""
    environment = {"PULID_STORE__URL": "s3://b/p", "PULID_PHOTOS__BUCKETS": '["x"]', "PULID_PRESET": "flux-dev"}
    settings = Settings.from_environment(environment, preset="miniature", store__link_seconds=60)
    assert (settings.preset, settings.store.url, settings.store.link_seconds) == ("miniature", "s3://b/p", 60)
    assert settings.photos.buckets == ("x",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PULID_PRESETT", "flux-dev"),
        ("PULID_PRESET", "flux-2"),
        ("PULID_STORE__URL", "ftp://x"),
        ("PULID_STORE__ATTEMPTS", "many"),
        ("PULID_PHOTOS__BUCKETS", "[oops"),
        ("PULID_DEVICE", "toaster"),
    ],
)
def test_a_wrong_variable_is_named(name, value):
    """An unknown or malformed variable is an error that names it."""
    with pytest.raises(SettingsInvalid, match=name):
        Settings.from_environment({name: value})


def test_settings_are_frozen():
    """Nobody changes a setting after it was read."""
    with pytest.raises(ValidationError):
        Settings().preset = "flux-dev"  # type: ignore[misc]
