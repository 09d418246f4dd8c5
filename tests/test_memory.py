from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from pipeline.memory import Mode, live_bytes, modes, table


@pytest.fixture(scope="module")
def found() -> dict[str, Mode]:
    return {mode.name: mode for mode in modes()}


def test_flux_takes_what_its_configuration_says(found: dict[str, Mode]) -> None:
    """23.80 GB whole, 17.24 without what makes the modulations, and half and a quarter of that in 8 and 4 bits."""
    flux = {name: round(mode.resident["FLUX"] / 1e9, 2) for name, mode in found.items()}
    assert flux == {"resident": 23.80, "lean": 17.24, "cast": 8.63, "gguf": 4.87, "nf4": 4.47}


def test_each_mode_fits_its_card(found: dict[str, Mode]) -> None:
    """bfloat16 as it is takes an 80 GB card's half; lean fits 24 GB, cast 16, GGUF and NF4 12."""
    limits = {"resident": 48, "lean": 24, "cast": 16, "gguf": 12, "nf4": 12}
    assert all(found[name].card <= limit for name, limit in limits.items())


def test_one_folded_identity_and_the_encoders(found: dict[str, Mode]) -> None:
    """126 MB of matrices an identity; 10.68 GB for T5-XXL, CLIP-L, EVA-CLIP and IDFormer."""
    assert found["lean"].resident["folded: a person, nobody"] == 2 * 20 * 2 * (512 * 3072 * 2 + 512)
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
