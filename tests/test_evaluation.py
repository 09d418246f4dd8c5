"""The evaluation's arithmetic, its reading of pictures, and what it says of good and of bad ones."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import SettingsInvalid
from pipeline.evaluation import metrics, people, report
from pipeline.evaluation.metrics import Figure
from pipeline.evaluation.painting import FULL, NOBODY, Condition, conditions
from pipeline.evaluation.run import Results


def test_a_mean_and_its_standard_error():
    """The mean of 1, 2, 3, 4 is 2.5, its standard error their deviation over the root of their number."""
    figure = metrics.mean([1, 2, 3, 4])
    assert figure.value == 2.5
    assert figure.error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert figure.count == 4


def test_pictures_of_one_person_are_one_observation():
    """Values of a group are averaged first: ten pictures of one person do not outweigh one of another."""
    figure = metrics.mean([0] * 10 + [1], groups=["a"] * 10 + ["b"])
    assert figure == Figure(0.5, 0.5, 2)


def test_rows_are_averaged_by_group():
    """A row per group, by rising name; rows that were not measured are left out, and a group of such is none."""
    rows = [[1, 2], [9, 9], [3, 4], [math.nan, 6], [math.nan, 1]]
    assert metrics.averaged(rows, [2, 1, 2, 2, 3]) == pytest.approx(
        np.array([[9, 9], [2, 3], [math.nan, math.nan]]), nan_ok=True
    )


def test_what_could_not_be_measured_is_left_out():
    """A NaN is no value; nothing but NaN is no figure; one value has no error."""
    assert metrics.mean([1, math.nan, 3]).value == 2
    assert math.isnan(metrics.mean([math.nan]).value)
    assert metrics.mean([]).count == 0
    assert math.isnan(metrics.mean([5]).error)


def test_a_correlation_and_its_standard_error():
    """A straight line correlates at 1 without error; a NaN is left out; what does not vary has no correlation."""
    assert metrics.correlation([1, 2, 3, math.nan], [2, 4, 6, 0]).value == pytest.approx(1)
    assert metrics.correlation([1, 2, 3], [2, 4, 6]).error == pytest.approx(0)
    figure = metrics.correlation([1, 2, 3, 4], [1, 3, 2, 4])
    assert figure.value == pytest.approx(0.8)
    assert figure.error == pytest.approx((1 - 0.64) / math.sqrt(3))
    assert math.isnan(metrics.correlation([1, 1, 1], [1, 2, 3]).value)


def test_cosines():
    """Equal directions 1, right angles 0, opposite -1, and nothing 0 with everything."""
    assert metrics.cosine([2, 0], [5, 0]) == 1
    assert metrics.cosine([2, 0], [-5, 0]) == -1
    assert metrics.cosines([[1, 0], [0, 0]], [[0, 3], [1, 1]]) == pytest.approx(np.array([[0, math.sqrt(0.5)], [0, 0]]))


@pytest.mark.parametrize(("degrees", "score"), [(0, 1), (45, 0), (90, -1), (30, 1 / 3)])
def test_copy_paste(degrees, score):
    """1 on the reference, -1 on the second photo, in between by the angles."""
    picture = (math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    assert metrics.copy_paste(picture, second=(0, 1), reference=(1, 0)) == pytest.approx(score)


def test_psnr():
    """An error of one step in 255 is 48.13 dB; equal pictures have no noise."""
    black = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr(black, black + 1) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(black, black) == math.inf


def test_distances_and_luminance():
    """Mean squares over all of a picture; white has the luminance 255, and green most of it."""
    one = np.ones((2, 2, 3))
    assert metrics.distances(one, np.stack((one, 3 * one))).tolist() == [0, 4]
    assert metrics.luminance([[255, 255, 255], [0, 255, 0]]) == pytest.approx([255, 0.587 * 255])


def test_conditions_hold_the_two_ends():
    """Weights from the first step, later steps at weight 1; nobody and all of it are always among them."""
    assert [each.name for each in conditions([0.5], [0, 4])] == ["0", "0.5", "1", "start_4"]
    assert conditions([]) == (NOBODY, FULL)
    for weights, starts in (([4], [0]), ([1], [20]), ([-1], [0]), ([1], [11])):
        with pytest.raises(SettingsInvalid, match="id_weight"):
            conditions(weights, starts)


def test_the_papers_prompts():
    """The shipped list is the paper's: 20 prompts, none of them a remark."""
    prompts = people.read_prompts()
    assert len(prompts) == len(set(prompts)) == 20
    assert all(prompt.startswith("portrait") for prompt in prompts)


def test_prompts_are_a_text_in_utf_8(tmp_path):
    """Another file is refused, and so is one that holds remarks only."""
    for content, told in ((b"portrait \xff", "not UTF-8"), (b"# remark\n", "no prompt")):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(SettingsInvalid, match=told):
            people.read_prompts(tmp_path / "prompts.txt")


def test_a_folder_of_people(tmp_path):
    """Each folder with photos is a person; the first photo conditions, the second is compared with, if there is one."""
    for name, files in {"ann": ("b.png", "a.jpg"), "bob": ("x.webp",), "empty": ("notes.txt",)}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(file.encode())
    subjects, cases = people.photographed(tmp_path, ["one", "two"], repeats=2, seed=7)
    assert [(s.name, s.reference, s.second) for s in subjects] == [
        ("ann", b"a.jpg", b"b.png"),
        ("bob", b"x.webp", None),
    ]
    assert [(c.subject, c.prompt, c.seed) for c in cases[:5]] == [
        (0, "one", 7),
        (0, "one", 8),
        (0, "two", 9),
        (0, "two", 10),
        (1, "one", 7),
    ]
    with pytest.raises(SettingsInvalid, match="one folder per person"):
        people.photographed(tmp_path / "empty", ["one"])


def results(**values):
    found = {name: Figure(value, 0.01, 3) for name, value in values.items()}
    by_condition = {NOBODY: found, FULL: found, Condition(1.0, 4): found}
    return Results({f"{name}_{c.name}": f for c in by_condition for name, f in found.items()}, by_condition)


def test_the_table_shows_what_was_measured():
    """A row per figure that is known, a column per condition, the error beside the value."""
    table = report.table(results(likeness=0.5, clip_t=math.nan)).splitlines()
    assert table[0] == "| | id_weight 0 | id_weight 1 | id_weight 1 from step 4 |"
    assert table[2] == "| likeness to a second photo |" + " 0.500 ± 0.010 |" * 3
    assert len(table) == 3


def test_the_table_says_among_how_many():
    """The right person of how many, a correlation of how many, and whose photos were of no use."""
    counts = {"top1_of": 59, "pix1_of": 60, "references_missed": 0, "photos_unusable": 1}
    table = report.table(replace(results(top1=0.9, pix1=0.8, skin_correlation=0.7), counts=counts)).splitlines()
    assert table[2].startswith("| right person of 59, by the judge | 0.900")
    assert table[3].startswith("| right person of 60, by pixels | 0.800")
    assert table[4] == "| skin, correlation |" + " 0.700 ± 0.010 (n 3) |" * 3
    assert "1 second photo(s)" in table[6]
    assert "reference photo" not in table[6]


def test_the_json_has_error_and_number_for_each_figure():
    """Keys are name and condition, errors end in _se, numbers of people in _n; what was not measured is null."""
    told = json.loads(report.as_json(results(likeness=0.5, clip_t=math.nan), {"seed": 3}))
    assert told["likeness_start_4"] == 0.5
    assert told["likeness_0_se"] == 0.01
    assert told["likeness_0_n"] == 3
    assert told["clip_t_1"] is None
    assert told["run"] == {"seed": 3}


def test_plots_are_drawn(tmp_path):
    """Two pictures, whatever was measured."""
    for index, found in enumerate((results(likeness=0.5, adherence=0.9), results(likeness=0.5, clip_t=0.3))):
        paths = report.plots(found, tmp_path / str(index))
        assert [path.name for path in paths] == ["tradeoff.png", "conditions.png"]
        assert all(path.stat().st_size > 5000 for path in paths)
