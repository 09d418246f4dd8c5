"""How much of the service one key may take."""

import pytest

from deployments.keys import Caller
from deployments.limits import Limits
from pipeline.errors import RateLimited
from pipeline.settings import Settings
from tests.test_keys import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(clock):
    return Limits(Settings().limits.retry_after_seconds, clock)


def caller(minute=None, jobs=None, tenant="acme", key="k"):
    return Caller(tenant, key, minute, jobs)


def spent(limits, who, most=10_000):
    """How many requests are let in now."""
    for count in range(most):
        try:
            limits.spend(who)
        except RateLimited:
            return count
    return most


@pytest.mark.parametrize("minute", [1, 2, 3, 7, 59, 60, 61, 600])
def test_the_told_seconds_are_true(limits, clock, minute):
    """A whole minute's worth comes in at once; then nothing until the told second, and then at least one."""
    assert spent(limits, caller(minute)) == minute
    with pytest.raises(RateLimited) as caught:
        limits.spend(caller(minute))
    wait = caught.value.retry_after
    assert wait == -(-60 // minute)
    clock.now += wait - 1
    assert spent(limits, caller(minute)) == (wait - 1) * minute // 60
    clock.now += 1
    assert spent(limits, caller(minute)) >= 1


def test_over_an_hour_the_rate_is_kept(limits, clock):
    """Somebody who always tries gets the burst and then the rate, and refused requests cost nothing."""
    total = 0
    for _ in range(3600):
        clock.now += 1
        total += spent(limits, caller(30), 3)
    assert total == pytest.approx(30 + 60 * 30, abs=1)


def test_a_pause_is_worth_a_minute_at_most(limits, clock):
    """After an hour of silence the bucket holds no more than after a minute."""
    spent(limits, caller(10))
    clock.now += 3600
    assert spent(limits, caller(10)) == 10


def test_keys_have_buckets_of_their_own(limits):
    """What one key has spent is nobody else's loss, and a key without a limit has none."""
    assert spent(limits, caller(5)) == 5
    assert spent(limits, caller(5, key="other")) == 5
    assert spent(limits, caller()) == 10_000


def test_a_limit_that_is_lowered_holds_at_once(limits):
    """A bucket that was filled under a higher limit does not outlive it."""
    limits.spend(caller(100))
    assert spent(limits, caller(10)) == 10


def test_only_so_many_are_in_the_making(limits):
    """The place of a request is free again when it ends, also when it fails; tenants do not share."""
    who = caller(jobs=2)
    with limits.admitted(who):
        with limits.admitted(who), pytest.raises(RateLimited), limits.admitted(who):
            pytest.fail("a third was let in")
        with limits.admitted(who), limits.admitted(caller(jobs=1, tenant="other")):
            pass
        with pytest.raises(ZeroDivisionError), limits.admitted(who):
            raise ZeroDivisionError
        with limits.admitted(who):
            pass


def test_open_jobs_and_other_keys_of_the_tenant_count(limits):
    """Jobs that go on without a request, and requests with the tenant's other key, take places too."""
    with limits.admitted(caller(key="old")), pytest.raises(RateLimited), limits.admitted(caller(jobs=3), open_jobs=2):
        pytest.fail("it was let in")
    with limits.admitted(caller(jobs=3), open_jobs=2):
        pass


def test_where_it_is_full_the_wait_follows_from_how_long_requests_take(limits, clock):
    """At first the usual seconds are told, less what the oldest has had; then the mean of those that have ended."""
    who = caller(jobs=1)

    def told():
        with pytest.raises(RateLimited) as caught, limits.admitted(who):
            pytest.fail("it was let in")
        return caught.value.retry_after

    with limits.admitted(who):
        assert told() == 5
        clock.now += 2
        assert told() == 3
        clock.now += 60
        assert told() == 1
    for _ in range(30):
        with limits.admitted(who):
            clock.now += 20
    with limits.admitted(who):
        assert told() == 20
