import pytest

from pipeline.curves import Curves, Shape

SMALL, LARGE, OTHER = Shape(8, 8, 32), Shape(64, 64, 128), Shape(32, 32, 128)
GAINS = {1: 1.0, 2: 1.1, 4: 1.44, 8: 2.55}  # performance.md 3.1: 512 x 512
NO_GAIN = {1: 1.0, 2: 1.95, 4: 3.9, 8: 7.8}  # 1024 x 1024


@pytest.fixture
def curves():
    made = Curves()
    made.measure(lambda shape, rows: (GAINS if shape == SMALL else NO_GAIN)[rows], [SMALL, LARGE], 8)
    return made


@pytest.mark.parametrize(("shape", "jobs", "rows"), [(SMALL, 2, 2), (SMALL, 4, 4), (LARGE, 2, 1), (LARGE, 8, 1)])
def test_a_batch_where_it_pays(curves, shape, jobs, rows):
    """Jobs share a pass only where t(B) / t(1) < (B + 1) / 2."""
    assert curves.best_jobs(shape, [1] * jobs, 8) == rows


def test_never_more_rows_than_allowed_or_there(curves):
    """Neither beyond max_rows nor beyond the jobs that wait."""
    assert curves.best_jobs(SMALL, [1] * 3, 8) == 3
    assert curves.best_jobs(SMALL, [1] * 8, 2) == 2
    assert curves.best_jobs(SMALL, [1], 8) == 1


def test_the_batch_is_the_one_whose_jobs_end_soonest_on_average():
    """Where two rows cost 1.1 and four 1.5, four jobs end soonest together; where four cost 1.9, in pairs."""
    for four, rows in ((1.5, 4), (1.9, 2)):
        curves = Curves()
        curves.measure(lambda _, rows, four=four: {1: 1.0, 2: 1.1, 4: four}[rows], [SMALL], 4)
        ends = {1: 2.5, 2: (1.1 + 2.2) / 2, 4: four}
        assert curves.best_jobs(SMALL, [1] * 4, 4) == rows == min(ends, key=ends.get)


def test_rows_that_are_all_needed_go_in_the_quickest_passes(curves):
    """The two passes of true CFG share one where two rows cost less than twice one, as at both shapes here."""
    assert curves.width(SMALL, 2, 8) == 2
    assert curves.width(LARGE, 2, 8) == 2
    assert Curves().width(SMALL, 2, 8) == 1  # nothing measured: nothing is won


def test_between_and_beyond_measured_points(curves):
    """Straight lines between; beyond the last point and below the first nothing is won."""
    assert curves.seconds(SMALL, 3) == pytest.approx((1.1 + 1.44) / 2)
    assert curves.seconds(SMALL, 16) == pytest.approx(2 * 2.55)
    assert curves.best_jobs(SMALL, [1] * 16, 16) <= 8


def test_a_shape_that_was_not_measured_borrows(curves):
    """It takes the curve of the shape with the nearest number of tokens, scaled."""
    assert curves.seconds(OTHER, 2) == pytest.approx(GAINS[2] * OTHER.tokens / SMALL.tokens)


def test_steps_correct_a_curve(curves):
    """What really happens wins over what was measured at start-up, little by little."""
    for _ in range(40):
        curves.learn(SMALL, 2, 1.9)
    assert curves.seconds(SMALL, 2) == pytest.approx(1.9, abs=1e-3)
    assert curves.best_jobs(SMALL, [1] * 2, 8) == 1
    curves.learn(OTHER, 1, 5.0)
    assert curves.seconds(OTHER, 1) != pytest.approx(OTHER.tokens / SMALL.tokens)


def test_measuring_stops_where_nothing_is_won():
    """Large batches of a shape that does not gain are never run at start-up."""
    ran = []
    Curves().measure(lambda _, rows: ran.append(rows) or float(rows), [LARGE], 8)
    assert set(ran) == {1, 2}


def test_one_slow_step_switches_nothing_off(curves):
    """A step that a neighbour or a compiler held up once does not change what is chosen; three in a row do."""
    curves.learn(SMALL, 2, 60.0)
    assert curves.best_jobs(SMALL, [1] * 2, 8) == 2
    for _ in range(40):
        curves.learn(SMALL, 2, 60.0)
    assert curves.best_jobs(SMALL, [1] * 2, 8) == 1


def test_what_is_not_run_is_tried_again(curves):
    """A batch that was slow for a while comes back: its seconds return to those of the start."""
    for _ in range(40):
        curves.learn(SMALL, 2, 1.9)
    for _ in range(1000):
        curves.learn(SMALL, 1, 1.0)
    assert curves.best_jobs(SMALL, [1] * 2, 8) == 2


def test_what_does_not_fit_is_never_chosen(curves):
    """Neither so many rows nor more, true CFG counting twice; a single row always may."""
    curves.forbid(SMALL, 4)
    assert curves.best_jobs(SMALL, [1] * 8, 8) == 3
    assert curves.best_jobs(SMALL, [2] * 4, 8) == 1
    assert curves.width(SMALL, 8, 8) < 4
    curves.forbid(SMALL, 1)
    assert curves.seconds(SMALL, 1) == 1.0


def test_a_shape_that_fails_alone_is_not_known():
    """Where not even one row fits at start-up there is no curve, and no number that is none."""
    made = Curves()
    made.measure(lambda shape, rows: float("inf") if shape == LARGE else GAINS[rows], [SMALL, LARGE], 8)
    assert not made.measured(LARGE)
    made.learn(LARGE, 1, 7.0)
    assert made.seconds(LARGE, 1) < 100
