"""The harness's own arithmetic and files; no figure that a benchmark times is asserted here."""

import asyncio
import json
import math
import statistics
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench import load, plots, results
from bench.__main__ import TITLES, main
from bench.compilation import stability
from bench.load_report import Sample, percentile, report, service_seconds, table
from bench.measure import Noise, Part, Result, at_least, at_most, compared, exactly
from bench.noop import no_ops, timed
from bench.registry import Run, has_gpu
from bench.soak_stages import soak_parts
from pipeline.request import Request
from pipeline.settings import Settings
from tests.fakes import A_FACE

RUN = {"date": "2026-01-02", "command": "python -m bench", "load": 0.5}
NOISE = Noise(1.0, 0.9, 1.1)
GOOD = Result((Part("speed", 4.5, at_least(4)), Part("gap", 1e-6, at_most(1e-5))), NOISE, "one sentence.")


def test_nothing_is_compiled_after_the_warm_up():
    """B13 is counted, not timed: what a replica rehearses are the very passes that its engine runs."""
    parts = stability(Run(1, "cpu")).parts
    assert len(parts) == 4
    assert {part.name: part.value for part in parts if not part.met} == {}


def test_targets_say_which_side_is_right():
    """At least, at most and exactly are what they say, at the limit too, and NaN meets nothing."""
    cases = [(at_least(2), 2, 1.9), (at_most(2), 2, 2.1), (exactly(0), 0, 1e-9)]
    for target, right, wrong in cases:
        assert target.met(right)
        assert not target.met(wrong)
        assert not target.met(math.nan)


def test_a_drift_of_the_machine_cancels():
    """A ratio is b over the mean of the two a's around it, and noise is a'/a."""
    found = compared([(1.0, 3.0, 2.0), (2.0, 5.0, 3.0), (3.0, 7.0, 4.0)])
    assert found.ratio == 2.0
    assert found.a == 2.5
    assert found.b == 5.0
    assert found.noise.median == 1.5
    assert found.noise.low <= found.noise.median <= found.noise.high


def test_a_result_is_met_only_with_all_its_parts():
    """results.json holds value, target and met for each key; one part that misses makes met false."""
    entry = results.as_entry(GOOD, RUN)
    assert (entry["value"], entry["target"], entry["met"]) == (4.5, ">= 4", True)
    missed = Result((GOOD.parts[0], Part("gap", 1e-4, at_most(1e-5))))
    assert results.as_entry(missed, RUN)["met"] is False
    json.dumps(entry, allow_nan=False)


def test_what_was_not_measured_has_no_figure():
    """Without a GPU an entry holds null and the reason, and the table says so."""
    entry = results.as_entry(Result(reason="no GPU"), RUN)
    assert (entry["value"], entry["met"]) == (None, None)
    assert "not measured: no GPU" in results.table({"B1": entry}, {"B1": "speed"})


def test_figures_of_another_machine_are_not_kept():
    """A new run replaces its own keys, keeps the others of this machine, and drops those of another."""
    old = {"B2": {"value": 1}, "B1": {"value": 0}, "machine": {"cores": 2}}
    here = results.merged(old, {"B1": {"value": 5}, "B10": {"value": 2}, "machine": {"cores": 2}})
    assert list(here) == ["B1", "B2", "B10", "machine"]
    assert here["B1"] == {"value": 5}
    assert "B2" not in results.merged(old, {"B1": {"value": 5}, "machine": {"cores": 4}})


def test_the_document_writer_is_idempotent():
    """Only what stands between the marks is replaced, and a second time changes nothing."""
    text = f"# Title\n{results.BEGIN}\nold\n{results.END}\n## 2026, kept\n"
    once = results.into_document(text, "| new |")
    assert once == f"# Title\n{results.BEGIN}\n| new |\n{results.END}\n## 2026, kept\n"
    assert results.into_document(once, "| new |") == once
    with pytest.raises(ValueError, match="needs the lines"):
        results.into_document("# no marks", "")


def test_a_missed_target_is_written_as_missed():
    """The table has a row per part with its target and whether it is met; under it stand machine, date and command."""
    entry = results.as_entry(Result((Part("waits", 0.5, at_most(0.3)),), NOISE, "how."), RUN)
    text = results.section({"B8": entry, "machine": {"cores": 2}}, {"B8": "short"})
    assert "| B8 | short: waits | 0.5 | <= 0.3 | **no** | 1.000, 0.900 to 1.100 |" in text
    for words in ("cores 2", "2026-01-02", "`python -m bench`", "- B8: how."):
        assert words in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (123.4, "123"), (17.24, "17.24"), (4.4614, "4.461"), (0.0123, "0.012"), (5.7e-7, "6e-07")],
)
def test_numbers_keep_the_digits_that_count(value, shown):
    """Four digits at most, a power of ten for what is tiny, and an exact 0."""
    assert results.number(value) == shown


def test_the_harness_runs_and_writes(tmp_path, capsys):
    """`python -m bench --only B1` prints its table and writes value, target and met, with the machine's facts."""
    path = tmp_path / "results.json"
    main(["--only", "B1", "--runs", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert set(found) == {"B1", "machine"}
    assert {"value", "target", "met", "parts", "a_a", "run"} <= set(found["B1"])
    assert found["B1"]["parts"]["largest relative difference, float32"]["met"]
    assert "| B1 |" in capsys.readouterr().out


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_no_figure_is_written(tmp_path, capsys):
    """`--device cuda` where there is none says so for each benchmark, and writes nothing."""
    path = tmp_path / "results.json"
    main(["--device", "cuda", "--json", str(path)])
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(TITLES)
    assert all("not measured: no GPU" in line or "not measured: is measured on cpu only" in line for line in told)
    assert not path.exists()


def test_an_unknown_benchmark_is_refused(capsys):
    """A key that does not exist ends with a sentence that names those that do."""
    with pytest.raises(SystemExit):
        main(["--only", "B99"])
    assert "no such benchmark: B99" in capsys.readouterr().err
    assert "B1, B2" in ", ".join(TITLES)


def test_arrivals_are_poisson_and_seeded():
    """The same seed gives the same moments; counts and gaps are those of a Poisson process of that rate."""
    moments = load.arrivals(50, 100, seed=1)
    assert moments == load.arrivals(50, 100, seed=1)
    assert moments != load.arrivals(50, 100, seed=2)
    assert moments == sorted(moments)
    assert 0 < moments[0] <= moments[-1] < 100
    assert abs(len(moments) - 5000) < 4 * math.sqrt(5000)
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)


def test_percentiles_are_nearest_ranks():
    """A percentile is one of the values; of one value it is that one."""
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_goodput_counts_good_answers_only():
    """Late and failed ones are no goodput, shed ones count apart, and rates count until the last answer."""
    samples = [
        Sample(due=0.0, latency=1.0, lag=0.0, status=200, service=0.75, engine_wait=0.125),
        Sample(due=5.0, latency=7.0, lag=0.0, status=200, service=1.0),
        Sample(due=6.0, latency=0.01, lag=0.0, status=429, code="overloaded", retry_after=True),
        Sample(due=7.0, latency=3.0, lag=0.0, status=0, code="ReadTimeout"),
    ]
    found = report(samples, rate=0.5, seconds=10, slo=2.0)
    assert (found["completed"], found["good"], found["shed"], found["shed_with_retry_after"]) == (2, 1, 1, 1)
    assert (found["offered_rate"], found["achieved_rate"], found["goodput"]) == (0.4, 2 / 12, 1 / 12)
    assert found["attainment"] == 0.25
    assert found["queue_wait"] == {"p50": 0.25, "p95": 6.0, "p99": 6.0}
    assert found["engine_wait"] == {"p50": 0.125, "p95": 0.125, "p99": 0.125}
    assert found["failures"] == {"0 ReadTimeout": 1, "429 overloaded": 1}
    assert "| 429 overloaded | 1 |" in table(found)


def test_service_is_the_longest_way():
    """Text is encoded beside faces and identity; `total` and `queue` are no service."""
    timings = {"faces": 1.0, "identity": 0.5, "text": 0.25, "denoise": 2.0, "store": 0.125, "total": 9.0, "queue": 4.0}
    assert service_seconds(timings) == 3.625
    assert service_seconds({**timings, "text": 3.0}) == 5.125
    assert service_seconds({}) is None


@contextmanager
def service(most):
    """A small HTTP server that answers at most `most` requests at once and sheds the rest, as ours does."""
    places, gate = threading.Semaphore(most), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            if not places.acquire(blocking=False):
                gate.set()  # what holds the places may end now
                return self.reply(429, {"code": "overloaded"}, {"Retry-After": "5"})
            gate.wait(10)
            places.release()
            return self.reply(200, {"timings": {"denoise": 0.0, "total": 0.0, "queue": 0.5}}, {})

        def reply(self, status, body, headers):
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{load.PATH}"
        finally:
            server.shutdown()
            thread.join()


def test_the_load_never_waits_for_answers():
    """A third request is sent while two are unanswered, is shed with Retry-After, and all three are reported."""
    with service(most=2) as url:
        samples = asyncio.run(load.send(load.Load(url, load.encoded({}), [0.0, 0.01, 0.02]), timeout=20))
    found = report(samples, rate=100, seconds=0.03, slo=20)
    assert (found["completed"], found["shed"], found["shed_with_retry_after"]) == (2, 1, 1)
    assert found["engine_wait"]["p50"] == 0.5
    assert all(sample.latency >= sample.lag >= 0 for sample in samples)


def test_a_service_that_is_not_there_is_a_failure():
    """A refused connection counts as a failure under the client's error, and stops nothing."""
    with service(most=1) as url:
        pass
    samples = asyncio.run(load.send(load.Load(url, load.encoded({}), [0.0, 0.0]), timeout=5))
    assert report(samples, 1, 1, 1)["failures"] == {"0 ConnectError": 2}


def test_plots_show_what_was_measured(tmp_path):
    """A plot is drawn for each sweep in the results, and none without one."""
    point = {"p50": 0.1, "p95": 0.2, "p99": 0.3}
    level = {"short": point, "long": point}
    sweep = {"load": 0.5, "latency": point, "queue_wait": point, "goodput": 1.0, "offered_rate": 1.0}
    drawn = plots.draw({"B12": {"details": {"sweep": [sweep], "slo": 1.0, "capacity": 2.0}}}, tmp_path)
    assert list(drawn) == [plots.LOAD]
    drawn = plots.draw(
        {"B8": {"details": {"sweep": [{"load": 0.5, "step_level": level, "request_level": level}]}}}, tmp_path
    )
    assert list(drawn) == [plots.LEVELS]
    assert {path.name for path in tmp_path.iterdir()} == {plots.LOAD, plots.LEVELS}
    assert plots.draw({}, tmp_path) == {}


def test_the_no_ops_are_stages_like_the_real_ones(tmp_path):
    """B10, B12 and the soak measure the application itself: replicas of these stages draw, and are healthy."""
    from deployments.denoiser import FluxDenoiser  # Ray, which reads its environment when it is imported
    from deployments.stages import FaceDetector, IdentityEncoder, TextEncoder

    settings = Settings(weights_dir=tmp_path)
    wanted = Request(prompt="portrait", num_steps=2, people=[{"photos": [A_FACE]}])

    async def go(parts):
        faces, identity = FaceDetector(settings, parts.faces), IdentityEncoder(settings, parts.identity)
        text, denoiser = TextEncoder(settings, parts.text), FluxDenoiser(settings, parts.denoise)
        found = await identity.encode(await faces.detect(wanted.people[0], 0), "mean")
        picture = await denoiser.denoise(wanted.with_seed(), 0, await text.encode("portrait", 128), None, found)
        for replica in (faces, identity, text, denoiser):
            replica.check_health()
        return picture.steps

    assert [asyncio.run(go(parts)) for parts in (no_ops(), timed(), soak_parts())] == [2, 2, 2]
