"""Benchmarks; none is a test. `python -m bench` runs them all, `python -m bench.load` puts load on a running service.

registry.py         what each is called, what it should reach, where it runs
measure.py          how things are timed; what a figure and a result are
results.py, plots.py   bench/results.json, and what docs/benchmarks.md is made of
models.py, engines.py, noop.py   what is measured: FLUX with random weights, engines over it, stages that do nothing
adapter.py ... service.py   the benchmarks: functions that take a Run and give a Result
load.py, load_report.py   open-loop Poisson load over HTTP, and what it met with
stages.py           `python -m bench.stages`: seconds per stage of the whole miniature, in-process and served
"""
