import asyncio
import time

import pytest

from deployments.board import Board, Notice, Step
from deployments.glance import Glance
from pipeline.jobs import Job
from pipeline.progress import BEGINNING, LAST, Position, ServerEvent


def steps(attempt, first, count):
    return [ServerEvent(Position(attempt, first + n), "step", {"done": n + 1, "total": 9}) for n in range(count)]


def run(test):
    return asyncio.run(asyncio.wait_for(test(Board(600)), 20))


def test_events_come_in_order_and_only_those_beyond_a_position():
    """Whoever comes back with the last id it has seen gets what came after, once."""

    async def test(board):
        assert await board.publish("a", 1, 0, steps(1, 0, 3)) == 3
        assert await board.publish("a", 1, 3, steps(1, 3, 2)) == 5
        events = await board.after("a", Position(1, 1))
        assert [event.at.number for event in events] == [2, 3, 4]
        assert await board.after("a", Position(1, 4)) == []

    run(test)


def test_a_batch_that_arrives_twice_counts_once():
    """An owner that did not hear the answer publishes again; nobody sees an event twice."""

    async def test(board):
        await board.publish("a", 1, 0, steps(1, 0, 3))
        assert await board.publish("a", 1, 1, steps(1, 1, 4)) == 5
        assert [event.at.number for event in await board.after("a")] == [0, 1, 2, 3, 4]

    run(test)


def test_an_empty_board_asks_for_what_it_misses():
    """A board that was lost gets all events of a running attempt again."""

    async def test(board):
        assert await board.publish("a", 1, 7, steps(1, 7, 1)) == 0
        assert await board.after("a") == []
        assert await board.publish("a", 1, 0, steps(1, 0, 8)) == 8

    run(test)


def test_an_attempt_that_was_taken_over_adds_nothing():
    """A zombie's events are not seen, and it is not asked for them again."""

    async def test(board):
        await board.publish("a", 1, 0, steps(1, 0, 2))
        await board.publish("a", 2, 0, steps(2, 0, 1))
        assert await board.publish("a", 1, 2, steps(1, 2, 3)) == 5
        assert [event.at for event in await board.after("a")] == [(1, 0), (1, 1), (2, 0)]

    run(test)


def test_nothing_follows_an_end():
    """A stopped job's owner may have more to say; its watchers have heard the end."""

    async def test(board):
        await board.publish("a", 1, 0, steps(1, 0, 2))
        await board.end("a", "cancelled", {})
        await board.end("a", "succeeded", {})
        assert await board.publish("a", 1, 2, steps(1, 2, 1)) == 3
        assert [event.name for event in await board.after("a")] == ["step", "step", "cancelled"]

    run(test)


def test_whoever_waits_is_woken():
    """An event reaches those who wait for it without delay; who waits in vain gets nothing, in time."""

    async def test(board):
        waiting = asyncio.ensure_future(board.after("a", BEGINNING, 15))
        await asyncio.sleep(0)
        await board.publish("a", 0, 0, steps(0, 0, 1))
        assert len(await waiting) == 1
        assert await board.after("a", Position(0, LAST), 0.01) == []

    run(test)


def test_notices_reach_every_replica_once():
    """Each replica hears of everything since it began to listen, and of nothing twice."""

    async def test(board):
        first, second = await board.notices("", 0, 1), await board.notices("", 0, 1)
        assert first.notices == ()
        waiting = asyncio.ensure_future(board.notices(first.board, first.after, 15))
        await asyncio.sleep(0)
        await board.notify("stopped", "a")
        await board.notify("queued", "b")
        heard = await waiting
        assert heard.notices[0] == Notice("stopped", "a")
        assert (await board.notices(second.board, second.after, 1)).notices == (
            Notice("stopped", "a"),
            Notice("queued", "b"),
        )
        assert (await board.notices("another", 17, 1)).notices == ()

    run(test)


def test_the_latest_steps_are_of_jobs_that_run():
    """Of each job that is not over its last step, of its last attempt; a job that ended or was forgotten has none."""

    async def test(board):
        await board.publish("a", 1, 0, steps(1, 0, 4))
        await board.publish("a", 2, 0, steps(2, 0, 2))
        await board.publish("b", 1, 0, steps(1, 0, 1))
        await board.end("b", "cancelled", {})
        assert await board.steps() == {"a": Step(2, 2, 9)}
        short = Board(0)
        await short.publish("a", 1, 0, steps(1, 0, 1))
        await short.after("b")
        assert await short.steps() == {}

    run(test)


def running(job_id="a", attempt=1):
    return Job(job_id, "acme", 1.0, 2.0, state="running", attempt=attempt)


def test_however_many_ask_the_board_is_asked_once():
    """A hundred reads at a time of what other replicas run are one call; a step of a lost attempt is not told."""

    class Counting(Board):
        calls = 0

        async def steps(self):
            self.calls += 1
            return await super().steps()

    async def test(_):
        board = Counting(600)
        await board.publish("a", 1, 0, steps(1, 0, 3))
        glance = Glance(board, fresh=60, glance=20)
        assert set(await asyncio.gather(*(glance.progress(running()) for _ in range(100)))) == {(3, 9)}
        assert await glance.progress(running(attempt=2)) is None
        assert await glance.progress(running("b")) is None
        assert board.calls == 1

    run(test)


def test_a_board_that_is_away_keeps_nobody_waiting():
    """One that does not answer costs the readers of a moment a glance, and then nobody; a broken one costs nothing."""

    class Silent(Board):
        async def steps(self):
            await asyncio.Event().wait()

    class Broken(Board):
        async def steps(self):
            raise ConnectionError

    async def test(_):
        glance = Glance(Silent(600))
        assert await glance.progress(running()) is None
        began = time.monotonic()
        assert set(await asyncio.gather(*(glance.progress(running()) for _ in range(1000)))) == {None}
        assert time.monotonic() - began < 5  # a glance each would be 50 s
        assert await Glance(Broken(600)).progress(running()) is None

    run(test)


def test_what_is_long_over_is_forgotten():
    """A board holds no job for longer than it should."""

    async def test(_):
        board = Board(0)
        await board.publish("a", 1, 0, steps(1, 0, 2))
        await board.publish("b", 1, 0, steps(1, 0, 2))
        assert await board.after("a") == []

    run(test)


@pytest.mark.parametrize("text", ["", "x", "1", "1-", "-1-2", "1-2-3", "１-２", "1-" + "9" * 10])
def test_a_foreign_last_event_id_means_the_beginning(text):
    """Whatever a client sends, it sees the events; never an error."""
    assert Position.parse(text) == BEGINNING
    assert Position.parse("2-17") == (2, 17)
