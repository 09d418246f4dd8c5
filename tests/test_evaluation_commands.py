"""The evaluation's commands: what they refuse before a network is read, whole runs, and the sheets."""

import json
import math
import shutil

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cluster import ablation
from cluster import sheet as sheets
from cluster.cli import app
from pipeline import weights
from pipeline.evaluation import people, sheet
from pipeline.evaluation.painting import Format, Painter
from pipeline.flow import load_stages
from pipeline.settings import Settings
from tests.face_models import red_squares

SEED = 176  # whose first three people have hair, and whose prompts ask for no hat on it
PROMISED = ("likeness_0", "likeness_0.5", "likeness_1", "random_pairs", "top1", "pix1")
PROMISED += ("skin_correlation", "hair_correlation", "adherence_0", "adherence_1")
CEILINGS = ("likeness_ceiling", "random_pairs_ceiling", "top1_ceiling", "pix1_ceiling", "adherence_ceiling")
CEILINGS += ("skin_correlation_ceiling", "hair_correlation_ceiling")


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Two people: one with two photos, one with one."""
    folder = tmp_path_factory.mktemp("people")
    for name, corners in {"ann": ((64, 64), (96, 64)), "bob": ((64, 96),)}.items():
        (folder / name).mkdir()
        for index, corner in enumerate(corners):
            photo = people.png(red_squares((256, 256), corner))
            (folder / name / f"{index}.png").write_bytes(photo)
    return folder


def evaluated(options):
    told = CliRunner().invoke(app, ["evaluate", *(str(part) for pair in options.items() for part in pair)])
    assert told.exit_code == 0, told.output
    return told.output, json.loads(options["--json"].read_text())


def test_the_promised_command(tmp_path):
    """On the shipped miniature every promised figure is measured, and so are the truth's."""
    table, found = evaluated(
        {"--preset": "miniature", "--people": 3, "--seed": SEED, "--steps": 2, "--json": tmp_path / "figures.json"}
    )
    for name in (*PROMISED, *CEILINGS, "vae_psnr"):
        assert math.isfinite(found[name]), name
        assert math.isfinite(found[f"{name}_se"]), name
        assert found[f"{name}_n"] == 3, name
    assert "| right person of 3, by pixels |" in table


def test_the_command_on_a_folder_of_people(untrained, album, tmp_path):
    """A table, plots, and a JSON whose figures have errors and name the files that they come from."""
    (tmp_path / "prompts.txt").write_text("# remark\nportrait of a person, in space\n")
    table, found = evaluated(
        {
            "--miniature-dir": untrained,
            "--people-dir": album,
            "--prompts": tmp_path / "prompts.txt",
            "--repeats": 1,
            "--json": tmp_path / "out" / "figures.json",
            "--plots": tmp_path / "plots",
            "--steps": 2,
            "--id-weights": "0.5",
            "--start-steps": "0,1",
        }
    )
    assert "| likeness to the reference photo |" in table
    for name in ("likeness", "likeness_ref", "top1", "clip_t", "clip_i", "faces_found", "adherence", "copy_paste"):
        for condition in ("0", "0.5", "1", "start_1"):
            assert {f"{name}_{condition}", f"{name}_{condition}_se", f"{name}_{condition}_n"} <= found.keys()
    assert found.keys() >= set(PROMISED)
    assert found["clip_i_0"] == pytest.approx(1)
    assert found["top1_of"] == 1
    assert found["top1"] is None
    assert "judge/recogniser.onnx" in found["run"]["models"]
    assert len(list((tmp_path / "plots").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--preset", "flux-dev"), "--people-dir"),
        (("--people-dir", "empty"), "one folder per person"),
        (("--id-weights", "a,b"), "not a list of numbers"),
        (("--people-dir", "album", "--prompts", "none.txt"), "none.txt"),
        (("--people-dir", "album", "--people", "3"), "--people counts drawn people"),
        (("--prompts", "long.txt"), "--prompts goes with --people-dir"),
        (("--repeats", "2"), "--repeats goes with --people-dir"),
        (("--people", "20000"), "choose 1 to"),
        (("--people", "1", "--width", "100"), "width"),
        (("--people", "1", "--height", "300"), "height"),
        (("--people-dir", "album", "--prompts", "long.txt"), "prompt"),
        (("--people", "1", "--json", "taken/figures.json"), "taken"),
        (("--people", "1", "--plots", "taken/plots"), "taken"),
        (("--preset", "flux-dev", "--people-dir", "album"), "--judge"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(options, told, album, tmp_path, monkeypatch):
    """A code or a file, and what is wrong with it; no traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").touch()
    (tmp_path / "long.txt").write_text("a person " * 1000)
    (tmp_path / "album").symlink_to(album)
    outcome = CliRunner().invoke(app, ["evaluate", *options])
    assert outcome.exit_code == 1
    assert told in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert isinstance(outcome.exception, SystemExit)


@pytest.mark.parametrize("options", [("--seed", str(10**30)), ("--people", "0"), ("--repeats", "0"), ("--steps", "31")])
def test_numbers_have_bounds(options):
    """Options out of range are refused as they are read."""
    outcome = CliRunner().invoke(app, ["evaluate", *options])
    assert outcome.exit_code == 2
    assert options[0] in outcome.output


def test_the_largest_seed_can_be_drawn():
    """A picture's seed of the last person of the largest seed is one that a request may have."""
    _, cases = people.drawn(1, 2**32 - 1)
    assert Format(256, 256).request(cases[0], ()).seed + people.MOST_PEOPLE < 2**53


def test_the_sheets(untrained):
    """Every sheet is one picture, whose rows are the cases: people, mixed people, two people side by side."""
    square = people.png(red_squares((256, 256), (64, 64)))
    subjects = [people.Subject(name, square) for name in ("ann", "bob")]
    cases = [people.Case(index, "a person", index) for index in (0, 1)]
    painter = Painter(load_stages(Settings(miniature_dir=untrained)), Format(256, 256, num_steps=1))
    pair = [(subjects[0], subjects[1])]
    row = 256 + 2 * sheet.CAPTION + sheet.GAP
    for rgb, rows, tiles in (
        (sheet.people_sheet(painter, subjects, cases), 2, 4),
        (sheet.mixed_sheet(painter, pair, cases[:1]), 1, 6),
        (sheet.together_sheet(painter, pair, cases[:1]), 1, 3),
    ):
        assert rgb.shape[0] == rows * row
        assert rgb.shape[1] >= tiles * 256


def test_a_long_prompt_is_written_in_several_lines():
    """What does not fit beside is written beneath, and nothing is cut: the ink ends before the border."""
    one, many = sheet.written("a person", 256), sheet.written("a person in front of a plain grey background, " * 3, 256)
    assert one.shape == (sheet.CAPTION, 256, 3)
    assert many.shape[0] > sheet.CAPTION + 2 * sheet.LINE
    for strip in (one, many):
        assert np.asarray(strip).min() < 120
        assert (strip[:, -1] == 255).all()
        assert (strip[-1] == 255).all()


def test_the_sheet_command(tmp_path):
    """All pictures of the README, from the shipped miniature."""
    sheets.main([str(tmp_path), "--people", "1", "--steps", "1", "--measured", "1"])
    names = {"sheet.png", "mixed.png", "together.png", "tradeoff.png", "conditions.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_the_ablation_command(tmp_path):
    """One table of the adapters that the three stages ended with, whatever folder the other networks are in."""
    folder = shutil.copytree(weights.SHIPPED, tmp_path / "weights", symlinks=True)
    for stage in ablation.STAGES:
        (tmp_path / "work" / stage).mkdir(parents=True)
        shutil.copy(folder / "pulid" / "pulid_flux_miniature.safetensors", tmp_path / "work" / stage)
    application = typer.Typer()
    application.command()(ablation.main)
    options = {
        "--work": tmp_path / "work",
        "--weights": folder,
        "--people": 2,
        "--steps": 1,
        "--json": tmp_path / "ablation.json",
    }
    told = CliRunner().invoke(application, [str(part) for pair in options.items() for part in pair])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert found.keys() >= ablation.STAGES.keys()
    assert found["flow"] == found["identity"] == found["alignment"]  # the same adapter
    assert all(f"| {name} |" in told.output for name in ablation.STAGES.values())
