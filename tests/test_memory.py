from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from pipeline.caches import ENTRY_BYTES
from pipeline.memory import Mode, live_bytes, modes, table
from pipeline.settings import EngineSettings, Settings


@pytest.fixture(scope="module")
def found() -> dict[str, Mode]:
    return {mode.name: mode for mode in modes()}


def test_flux_takes_what_its_configuration_says(found: dict[str, Mode]) -> None:
    """23.80 GB whole, 17.24 without what makes the modulations, and half and a quarter of that in 8 and 4 bits."""
    flux = {name: round(mode.resident["FLUX"] / 1e9, 2) for name, mode in found.items()}
    assert flux == {"resident": 23.80, "lean": 17.24, "cast": 8.63, "gguf": 4.87, "nf4": 4.47}


def test_each_mode_fits_its_card(found: dict[str, Mode]) -> None:
    """With its own defaults, bfloat16 as it is fits 48 GiB, lean 24, cast 12, GGUF and NF4 8."""
    cards = {name: mode.card for name, mode in found.items()}
    assert cards == {"resident": 48, "lean": 24, "cast": 12, "gguf": 8, "nf4": 8}


def test_the_table_follows_the_settings() -> None:
    """More identities and rows than the defaults of the modes for small cards take larger cards."""
    larger = {mode.name: mode.card for mode in modes(EngineSettings(folded_bytes=10**9, max_rows=8))}
    assert larger == {"resident": 48, "lean": 32, "cast": 24, "gguf": 16, "nf4": 16}


def test_one_folded_identity_and_the_encoders(found: dict[str, Mode]) -> None:
    """126 MB for nobody beside what is kept, where a person's 126 MB fit; 10.68 GB for the encoders."""
    identity = 20 * 2 * (512 * 3072 * 2 + 512)
    kept = found["lean"].resident["folded identities, nobody"] - identity
    assert kept == Settings(acceleration={"memory": "lean"}).folded_bytes > identity + ENTRY_BYTES
    assert round(found["resident"].resident["text and identity encoders"] / 1e9, 2) == 10.68


def test_live_bytes_are_those_of_the_worst_moment() -> None:
    """What is dropped counts no more, a view not again, and what was there before not at all."""
    there = torch.empty(100, device="meta")

    def run() -> torch.Tensor:
        first = there + 1
        second = first.view(10, 10) * 2
        del first
        return second.sum()

    assert live_bytes(run, [there]) == 800


def test_the_documentation_has_the_table(found: dict[str, Mode]) -> None:
    """docs/settings.md says what each mode takes, to the hundredth of a gigabyte, and for which card."""
    text = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()
    for mode in found.values():
        flux, drawing, total = (f"{size / 1e9:.2f}" for size in (mode.resident["FLUX"], mode.drawing, mode.total))
        assert f"| `{mode.name}` | {mode.card} | {flux} | {drawing} | {total} |" in text


def test_the_command_prints_it(found: dict[str, Mode]) -> None:
    """`pulid memory` prints every mode with its sum."""
    result = CliRunner().invoke(app, ["memory"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == "\n".join(table(found.values())).splitlines()
