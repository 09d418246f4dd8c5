"""bench/results.json and the tables of docs/benchmarks.md that are made of it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.measure import Noise, Part, Result

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MACHINE = "machine"


def as_entry(result: Result, run: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark as JSON values: value, target and met of its first part, met only if all of them are.

    A benchmark that was not measured has null there, and the reason under `not_measured`.
    """
    if not result.parts:
        return {"value": None, "target": None, "met": None, "not_measured": result.reason}
    first = result.parts[0]
    return {
        "value": first.value,
        "target": str(first.target),
        "met": all(part.met for part in result.parts),
        "parts": {part.name: _part(part) for part in result.parts},
        "a_a": _noise(result.noise),
        "method": result.method,
        "details": dict(result.details),
        "run": dict(run),
    }


def _part(part: Part) -> dict[str, Any]:
    return {"value": part.value, "unit": part.unit, "target": str(part.target), "met": part.met}


def _noise(noise: Noise | None) -> dict[str, float] | None:
    return None if noise is None else {"median": noise.median, "low": noise.low, "high": noise.high}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """New entries over old ones; figures of another machine or other versions are not kept beside them."""
    kept = old if old.get(MACHINE) == new[MACHINE] else {}
    both = {**kept, **new}
    return {key: both[key] for key in sorted(both, key=_order)}


def _order(key: str) -> tuple[int, str]:
    number = re.fullmatch(r"B(\d+)", key)
    return (int(number[1]), key) if number else (1000, key)


def read(path: Path) -> dict[str, Any]:
    """The results in a file; none where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(path: Path, results: Mapping[str, Any]) -> None:
    """The results into a file, readable and in a fixed order."""
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def table(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """A row per part: what it is, its value, its target, whether that is met, and the A/A noise."""
    lines = ["| | | measured | asked | met | A/A, first to last decile |", "|---|---|---|---|---|---|"]
    for key, title in titles.items():
        entry = results.get(key)
        if entry is None or entry["value"] is None:
            reason = "" if entry is None else f": {entry['not_measured']}"
            lines.append(f"| {key} | {title} | not measured{reason} | | | |")
            continue
        noise, name = _cell(entry["a_a"]), f"{key} | {title}: "
        for part, one in entry["parts"].items():
            met = "yes" if one["met"] else "**no**"
            lines.append(f"| {name}{part} | {number(one['value'])} {one['unit']} | {one['target']} | {met} | {noise} |")
            noise, name = "", " | "
    return "\n".join(line.replace("  ", " ") for line in lines)


def number(value: float) -> str:
    """Two to four digits that count; what is tiny as a power of ten."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.4g}"


def _cell(noise: Mapping[str, float] | None) -> str:
    return "" if noise is None else f"{noise['median']:.3f}, {noise['low']:.3f} to {noise['high']:.3f}"


def section(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """A table with its hardware, dates, commands and methods under it; empty results say that there are none."""
    measured = {key: results[key] for key in titles if results.get(key, {}).get("value") is not None}
    if not measured:
        return ""
    facts = ", ".join(f"{name} {value}" for name, value in results[MACHINE].items())
    runs: dict[tuple[str, str], list[str]] = {}
    for key, entry in measured.items():
        runs.setdefault((entry["run"]["date"], entry["run"]["command"]), []).append(key)
    dates = [f"{', '.join(keys)}: {date}, `{command}`" for (date, command), keys in runs.items()]
    loads = [entry["run"]["load"] for entry in measured.values()]
    methods = [f"- {key}: {entry['method']}" for key, entry in measured.items() if entry["method"]]
    return "\n".join(
        [
            f"On {facts}. {'; '.join(dates)}. Load average {min(loads):g} to {max(loads):g}.",
            *("", table(results, titles), "", *methods),
        ]
    )


def into_document(text: str, inner: str) -> str:
    """The document with what stands between its two marks replaced; both marks have to be there, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document needs the lines {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inner.strip()}\n{END}{rest.split(END)[1]}"
