"""The engine's laws, on a painter whose steps cost what a curve says on a clock of its own."""

import gc
import random
import weakref
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from pipeline.curves import Curves, Shape
from pipeline.engine import Engine
from pipeline.errors import Cancelled, DeadlineExceeded, Overloaded
from pipeline.events import Done, Failed, Previewed, Queued, Stepped

GAINING, FLAT = Shape(8, 8, 32), Shape(64, 64, 128)
SECONDS = {GAINING: {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.0}, FLAT: {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}}


@dataclass(eq=False)
class Work:
    name: str
    steps: int
    shape: Shape = FLAT
    fails_at: int | None = None
    bad_start: bool = False


@dataclass(eq=False)
class Drawing:
    work: Work
    step: int = 0


@dataclass
class Painter:
    """Counts, and lets its clock run."""

    now: float = 0.0
    passes_run: list = field(default_factory=list)

    def shape(self, work):
        return work.shape

    def steps(self, work):
        return work.steps

    def passes(self, work, done):
        return work.steps - done

    def begin(self, work):
        if work.bad_start:
            raise ValueError("a mask that is no picture")
        return Drawing(work)

    def advance(self, drawings):
        assert len({drawing.work.shape for drawing in drawings}) == 1
        if any(drawing.work.fails_at == drawing.step for drawing in drawings):
            raise RuntimeError("out of memory")
        self.now += CURVES.seconds(drawings[0].work.shape, len(drawings))
        self.passes_run.append([drawing.work.name for drawing in drawings])
        for drawing in drawings:
            drawing.step += 1

    def preview(self, drawing):
        if drawing.work.name == "no preview":
            raise ValueError("out of memory")
        return f"{drawing.work.name} after {drawing.step}"

    def relieve(self, error):
        return isinstance(error, MemoryError)

    def finish(self, drawing):
        if drawing.work.name == "black":
            raise ValueError("black all over")
        return f"{drawing.work.name} after {drawing.step}"


CURVES = Curves()
CURVES.measure(lambda shape, rows: SECONDS[shape][rows], SECONDS, 8)


class Bench:
    """An engine, its painter, and what each picture was told, by its name."""

    def __init__(self, **limits):
        self.painter = Painter()
        self.engine = Engine(self.painter, CURVES, clock=lambda: self.painter.now, **limits)
        self.events, self.tickets, self.ended = {}, {}, {}

    def submit(self, work, **options):
        told = self.events.setdefault(work.name, [])

        def listen(event):
            told.append(event)
            if isinstance(event, Done | Failed):
                self.ended[work.name] = self.painter.now

        self.tickets[work.name] = self.engine.submit(work, listen, **options)

    def run(self):
        while any((self.engine.step(), self.engine.finish())):
            pass
        return self.ended


@pytest.fixture
def bench():
    return Bench()


def test_a_picture_is_told_from_its_start_to_its_end():
    """Queued, every step, a preview after every second, the picture."""
    bench = Bench(preview_steps=2)
    bench.submit(Work("one", 4))
    bench.run()
    kinds = [type(event) for event in bench.events["one"]]
    assert kinds == [Queued, Stepped, Stepped, Previewed, Stepped, Stepped, Done]
    assert [event.done for event in bench.events["one"] if isinstance(event, Stepped)] == [1, 2, 3, 4]
    assert bench.events["one"][3].pixels == "one after 2"
    assert bench.events["one"][-1].picture == "one after 4"


def test_pictures_of_a_gaining_shape_share_their_passes(bench):
    """Two at once, and one that comes later joins at the next step."""
    for name in ("a", "b"):
        bench.submit(Work(name, 3, GAINING))
    bench.engine.step()
    bench.submit(Work("c", 3, GAINING))
    bench.run()
    assert bench.painter.passes_run[:2] == [["a", "b"], ["a", "b", "c"]]
    assert all(isinstance(events[-1], Done) for events in bench.events.values())


def test_pictures_of_a_shape_that_does_not_gain_go_one_after_another(bench):
    """Equal ones in the order in which they came, without a change in between."""
    for name in ("a", "b"):
        bench.submit(Work(name, 3))
    bench.run()
    assert bench.painter.passes_run == [["a"]] * 3 + [["b"]] * 3


def test_shapes_never_share_a_pass(bench):
    """Pictures of different size or text length are never in one forward pass."""
    bench.submit(Work("a", 3, GAINING))
    bench.submit(Work("b", 3, FLAT))
    bench.run()
    assert all(len(names) == 1 for names in bench.painter.passes_run)


def test_a_short_picture_does_not_wait_for_a_long_one(bench):
    """4 steps that come at step 2 of 28 end after 4 more; the long one ends 4 later than alone."""
    bench.submit(Work("long", 28))
    bench.engine.step()
    bench.engine.step()
    bench.submit(Work("short", 4))
    ended = bench.run()
    assert ended == {"short": 6.0, "long": 32.0}


def test_a_long_picture_ends_though_short_ones_never_stop(bench):
    """Later ones overtake it for as long as its own work takes, and no longer."""
    bench.submit(Work("long", 10))
    for number in range(100):
        bench.submit(Work(f"short {number}", 2))
        for _ in range(2):
            bench.engine.step()
            bench.engine.finish()
        if "long" in bench.ended:
            break
    assert bench.ended["long"] == pytest.approx(20.0, abs=2.0)


def test_of_two_that_would_be_late_the_earlier_deadline_goes_first(bench):
    """Both are in time, though the one that is due first came last and is not the shorter."""
    bench.submit(Work("later", 6), seconds=13)
    bench.engine.step()
    bench.submit(Work("sooner", 6), seconds=7)
    bench.run()
    assert bench.ended == {"sooner": 7.0, "later": 12.0}
    assert all(isinstance(events[-1], Done) for events in bench.events.values())


def test_the_longer_goes_first_where_it_is_due_first(bench):
    """Both have a step to spare; the shorter one, by which the mean wait would be less, is due later."""
    bench.submit(Work("short", 4), seconds=10.9)
    bench.submit(Work("long", 6), seconds=6.9)
    bench.run()
    assert bench.ended == {"long": 6.0, "short": 10.0}


def test_who_is_let_in_is_not_made_late_by_who_comes_later(bench):
    """A later one with a tighter deadline, which would take an earlier one's time, is refused."""
    bench.submit(Work("accepted", 10), seconds=16)
    bench.engine.step()
    with pytest.raises(Overloaded):
        bench.submit(Work("greedy", 12), seconds=12.5)
    bench.submit(Work("modest", 5), seconds=5.5)
    bench.run()
    assert bench.ended == {"modest": 6.0, "accepted": 15.0}
    assert all(isinstance(bench.events[name][-1], Done) for name in ("modest", "accepted"))


def test_two_that_only_one_has_time_for_are_not_both_let_in(bench):
    """Their deadlines together are what counts, not each against the other's rank of the moment."""
    bench.submit(Work("first", 10), seconds=12)
    with pytest.raises(Overloaded):
        bench.submit(Work("second", 4), seconds=13)
    bench.submit(Work("third", 4), seconds=14.5)
    bench.run()
    assert all(isinstance(bench.events[name][-1], Done) for name in ("first", "third"))


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_let_in_is_in_time(seed):
    """Whatever comes when: a deadline that was accepted is kept, as long as steps take what they took."""
    bench, draw = Bench(max_jobs=1000), random.Random(seed)
    for number in range(200):
        work = Work(str(number), draw.randint(1, 12), draw.choice([GAINING, FLAT]))
        seconds = work.steps * draw.choice([1.2, 2, 5]) if draw.random() < 0.6 else float("inf")
        with suppress(Overloaded):
            bench.submit(work, seconds=seconds)
        for _ in range(draw.randint(0, 12)):
            bench.engine.step()
            while bench.engine.finish():
                pass
    while bench.engine.step():
        while bench.engine.finish():
            pass
    assert not [name for name, events in bench.events.items() if events and isinstance(events[-1], Failed)]
    assert len(bench.ended) > 100


def test_decoding_takes_time_too():
    """A picture whose steps would end in time, but not its decoding, is refused, not drawn to be thrown away."""
    bench = Bench()
    finish = bench.painter.finish

    def slow(drawing):
        bench.painter.now += 3
        return finish(drawing)

    bench.painter.finish = slow
    for number in range(20):
        bench.submit(Work(str(number), 1))
        bench.run()
    with pytest.raises(DeadlineExceeded):
        bench.submit(Work("hopeless", 4), seconds=6)
    bench.submit(Work("in time", 4), seconds=8)
    bench.run()
    assert isinstance(bench.events["in time"][-1], Done)


def test_who_cannot_begin_in_time_is_not_let_in():
    """Where no more pictures may begin, a newcomer waits for the first of them to end."""
    bench = Bench(max_begun=2)
    for name, steps in (("a", 28), ("b", 20)):
        bench.submit(Work(name, steps, GAINING))
    bench.engine.step()
    with pytest.raises(Overloaded):
        bench.submit(Work("newcomer", 4), seconds=6)


def test_a_long_picture_is_not_kept_waiting_by_deadlines_for_ever():
    """Once it was overtaken for as long as its own work takes, tight deadlines are no longer let in before it."""
    bench = Bench()
    bench.submit(Work("long", 10))
    for number in range(100):
        with suppress(Overloaded):
            bench.submit(Work(f"tight {number}", 2), seconds=2.5)
        bench.engine.step()
        bench.engine.step()
        bench.engine.finish()
        if "long" in bench.ended:
            break
    assert bench.ended["long"] <= 24


def test_priority_goes_first_and_lower_ones_never_slow_it(bench):
    """A higher priority takes over at the next step, and shares no pass with a lower one."""
    bench.submit(Work("low", 3, GAINING))
    bench.engine.step()
    bench.submit(Work("high", 3, GAINING), priority=1)
    bench.run()
    assert bench.painter.passes_run == [["low"], *[["high"]] * 3, *[["low"]] * 2]


def test_who_is_too_late_leaves_at_the_next_step(bench):
    """A deadline ends a picture with DeadlineExceeded, while it runs and while it waits."""
    bench.submit(Work("running", 3), seconds=4)
    bench.submit(Work("waiting", 3), seconds=7)
    bench.submit(Work("patient", 3))
    bench.engine.step()
    bench.painter.now += 5  # a step that was slower than any before
    bench.run()
    assert isinstance(bench.events["running"][-1].error, DeadlineExceeded)
    assert isinstance(bench.events["waiting"][-1].error, DeadlineExceeded)
    assert isinstance(bench.events["patient"][-1], Done)


def test_what_cannot_be_in_time_is_refused_at_once(bench):
    """A deadline that what goes first and the own steps leave no room for is Overloaded, not accepted in vain."""
    bench.submit(Work("first", 10), seconds=15)
    with pytest.raises(Overloaded, match="in its time"):
        bench.submit(Work("late", 10), seconds=19)
    bench.submit(Work("in time", 10), seconds=25)
    bench.submit(Work("short", 4), seconds=4.5)  # it goes before both
    assert bench.run().keys() == {"first", "in time", "short"}
    assert isinstance(bench.events["short"][-1], Done)
    with pytest.raises(DeadlineExceeded):  # not even alone, so that trying again would not help
        bench.submit(Work("hopeless", 10), seconds=2)


def test_what_was_never_measured_is_tried_where_nobody_else_is(bench):
    """An estimate that is borrowed from other shapes refuses nothing for ever: drawn once, the shape is known."""
    bench.submit(Work("in vain", 4, Shape(16, 16, 32)), seconds=0.5)
    bench.run()
    assert isinstance(bench.events["in vain"][-1].error, DeadlineExceeded)
    assert bench.painter.passes_run == [["in vain"]]
    bench.submit(Work("other", 4))
    with pytest.raises(Overloaded):
        bench.submit(Work("beside another", 4, Shape(16, 8, 32)), seconds=0.5)


@pytest.mark.parametrize("steps", [0, 2])
def test_who_is_cancelled_leaves_at_the_next_step(bench, steps):
    """Before it begins or in the middle: no further step is spent on it."""
    bench.submit(Work("one", 5, GAINING))
    bench.submit(Work("two", 5, GAINING))
    for _ in range(steps):
        bench.engine.step()
    bench.engine.cancel(bench.tickets["one"])
    bench.run()
    assert sum("one" in names for names in bench.painter.passes_run) == steps
    assert isinstance(bench.events["one"][-1].error, Cancelled)
    assert isinstance(bench.events["two"][-1], Done)


def test_a_failing_row_fails_alone(bench):
    """A batch that fails is tried row by row: the bad one ends with its own error, the others go on."""
    for work in (Work("good", 3, GAINING), Work("bad", 3, GAINING, fails_at=1), Work("fine", 3, GAINING)):
        bench.submit(work)
    bench.run()
    assert isinstance(bench.events["bad"][-1].error, RuntimeError)
    assert [bench.events[name][-1].picture for name in ("good", "fine")] == ["good after 3", "fine after 3"]


def test_a_preview_that_fails_costs_nothing_else():
    """It is left out and counted; its picture and those of others are finished."""
    bench = Bench(preview_steps=1)
    bench.submit(Work("no preview", 3))
    bench.submit(Work("good", 3))
    bench.run()
    assert isinstance(bench.events["no preview"][-1], Done)
    assert not any(isinstance(event, Previewed) for event in bench.events["no preview"])
    assert isinstance(bench.events["good"][-1], Done)
    assert bench.engine.stats().previews_failed == 2


def test_a_batch_that_is_too_large_is_tried_row_by_row_with_its_memory_free():
    """Nothing of the batch that failed is alive when its rows are tried, or each of them would fail for want of it."""
    bench = Bench()
    advance, held = bench.painter.advance, []

    class Tensor:
        """What a failing pass would hold."""

    def small_card(drawings):
        if len(drawings) > 1:
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            raise MemoryError("out of memory")
        assert not [tensor for tensor in held if tensor() is not None]
        advance(drawings)

    bench.painter.advance = small_card
    for number in range(3):
        bench.submit(Work(str(number), 4, GAINING))
    bench.run()
    assert bench.engine.stats().done == 3
    assert held
    assert {len(names) for names in bench.painter.passes_run} == {1}


def test_what_has_no_memory_to_begin_waits_for_others():
    """A picture that cannot begin beside others begins when one of them has ended; alone it fails."""
    bench = Bench()
    begin, begun = bench.painter.begin, []

    def small_card(work):
        begun.append(work.name)
        if work.name == "large" or (work.name == "second" and begun.count("second") == 1):
            raise MemoryError("out of memory")
        return begin(work)

    bench.painter.begin = small_card
    bench.submit(Work("first", 5))
    bench.engine.step()
    bench.submit(Work("second", 2))
    bench.run()
    assert isinstance(bench.events["second"][-1], Done)
    assert begun == ["first", "second", "second"]
    bench.submit(Work("large", 2))
    bench.run()
    assert isinstance(bench.events["large"][-1].error, MemoryError)


def test_who_will_be_late_anyway_holds_nobody_up(bench):
    """A deadline that was missed already puts a picture ahead of nobody."""
    bench.submit(Work("lost", 6), seconds=7)
    bench.painter.now += 4  # somebody else's step
    bench.submit(Work("due", 4), seconds=5)
    bench.run()
    assert isinstance(bench.events["due"][-1], Done)
    assert isinstance(bench.events["lost"][-1].error, DeadlineExceeded)


def test_begun_pictures_are_bounded():
    """With two at most a third waits, however short it is, until one of them has ended; those that run go on."""
    bench = Bench(max_begun=2)
    for steps in (9, 6, 3):
        bench.submit(Work(f"of {steps}", steps))
        bench.engine.step()
    assert bench.painter.passes_run == [["of 9"], ["of 6"], ["of 6"]]
    bench.run()
    assert list(bench.ended) == ["of 6", "of 3", "of 9"]


def test_newcomers_that_take_long_to_begin_do_so_one_a_step():
    """Whoever runs already goes on between their beginnings: a step waits for one of them at most."""
    bench = Bench()
    begin = bench.painter.begin

    def slow(work):
        bench.painter.now += 0.5
        return begin(work)

    bench.painter.begin = slow
    for number in range(4):
        bench.submit(Work(str(number), 3, GAINING))
    before = bench.painter.now
    bench.engine.step()
    assert bench.painter.now - before <= 0.5 + SECONDS[GAINING][4]
    assert [len(names) for names in bench.painter.passes_run] == [1]
    bench.run()
    assert bench.engine.stats().done == 4


def test_who_would_be_late_goes_before_who_is_short():
    """A deadline puts a picture ahead of shorter ones when it could not be kept otherwise."""
    bench = Bench()
    bench.submit(Work("due", 6), seconds=9.5)
    for number in range(4):
        bench.submit(Work(f"short {number}", 2))
    bench.run()
    assert isinstance(bench.events["due"][-1], Done)
    assert bench.engine.stats().done == 5


def test_a_picture_that_cannot_begin_or_end_fails_alone(bench):
    """What a picture's own beginning or decoding raises is its own error."""
    for work in (Work("mask", 2, GAINING, bad_start=True), Work("black", 2, GAINING), Work("good", 2, GAINING)):
        bench.submit(work)
    bench.run()
    assert str(bench.events["mask"][-1].error) == "a mask that is no picture"
    assert str(bench.events["black"][-1].error) == "black all over"
    assert bench.events["good"][-1].picture == "good after 2"


def test_an_engine_takes_no_more_than_it_may():
    """Beyond max_jobs a picture is Overloaded; one that is cancelled makes room at once."""
    bench = Bench(max_jobs=2)
    bench.submit(Work("a", 2))
    bench.submit(Work("b", 2))
    with pytest.raises(Overloaded):
        bench.submit(Work("c", 2))
    bench.engine.cancel(bench.tickets["b"])
    bench.submit(Work("c", 2))
    assert set(bench.run()) == {"a", "b", "c"}


def test_nothing_is_left_of_what_has_ended():
    """After a thousand pictures, a part of them cancelled or failing anywhere, the engine holds none of them."""
    bench, draw = Bench(max_jobs=2000), random.Random(0)
    kept = []
    for number in range(1000):
        fails_at = draw.choice([None, None, None, 1])
        work = Work(str(number), draw.randint(1, 4), draw.choice([GAINING, FLAT]), fails_at)
        kept.append(weakref.ref(work))
        bench.submit(work)
        del work
        for _ in range(draw.randint(0, 3)):
            bench.engine.step() or bench.engine.finish()
        if draw.random() < 0.3:
            bench.engine.cancel(bench.tickets[str(number)])
    bench.run()
    stats = bench.engine.stats()
    assert (stats.waiting, stats.running, stats.drawn) == (0, 0, 0)
    assert stats.done + stats.failed + stats.cancelled == 1000
    assert min(stats.done, stats.failed, stats.cancelled) > 50
    bench.tickets.clear()
    bench.events.clear()  # errors know the frames that they passed
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
