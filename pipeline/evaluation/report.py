"""What an evaluation found, as a table, as JSON and as plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.metrics import Figure
from pipeline.evaluation.painting import FULL, Condition
from pipeline.evaluation.run import Results

# rows of the table: the figure's name, and what it is
ROWS: Mapping[str, str] = {
    "likeness": "likeness to a second photo",
    "likeness_ref": "likeness to the reference photo",
    "random_pairs": "likeness to other people",
    "copy_paste": "copy-paste score",
    "top1": "right person, by the judge",
    "pix1": "right person, by pixels",
    "skin_correlation": "skin, correlation",
    "hair_correlation": "hair, correlation",
    "hair_lost": "hair lost",
    "background": "background as in the prompt",
    "hat": "hat, or none, as in the prompt",
    "hat_worn": "hat, where one is asked for",
    "adherence": "adherence (mean of the two)",
    "both": "background and hat together",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "faces_found": "faces found",
}
INK, MUTED, GRID = "#222222", "#6b6b6b", "#dddddd"
LIKENESS, ADHERENCE = "#1f6f8b", "#c8553d"


def as_json(results: Results, run: Mapping[str, Any]) -> str:
    """The figures by name, with error and number of people as `<name>_se` and `<name>_n`; the counts; the `run`.

    null stands for what could not be measured.
    """
    flat: dict[str, Any] = dict(results.counts)
    for name, figure in sorted(results.figures.items()):
        flat[name], flat[f"{name}_se"], flat[f"{name}_n"] = _number(figure.value), _number(figure.error), figure.count
    return json.dumps({**flat, "run": run}, indent=1) + "\n"


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def table(results: Results) -> str:
    """A table in Markdown: a row per figure, a column per condition, and the ceiling; +- one standard error.

    Correlations say of how many people they are. Rows that were measured nowhere are left out.
    """
    columns = {_heading(condition): found for condition, found in results.by_condition.items()}
    columns |= {"ceiling": results.ceiling} if results.ceiling else {}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, told in ROWS.items():
        cells = [_cell(found.get(name, Figure()), counted=name.endswith("correlation")) for found in columns.values()]
        among = f" of {results.counts[f'{name}_of']}" if f"{name}_of" in results.counts else ""
        if any(cells):
            lines.append(f"| {told.replace('right person', f'right person{among}')} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_remarks(results)])


def _remarks(results: Results) -> list[str]:
    found = []
    if "vae_psnr" in results.figures:
        found.append(f"The autoencoder gives whole drawings back with {_cell(results.figures['vae_psnr'])} dB.")
    if missed := results.counts.get("references_missed"):
        found.append(f"No face is found in {missed} reference photo(s): no pictures, which count as faceless ones.")
    if unusable := results.counts.get("photos_unusable"):
        found.append(f"No face is found in {unusable} second photo(s): their people's likeness is not measured.")
    return ["\n" + " ".join(found)] if found else []


def _heading(condition: Condition) -> str:
    start = f" from step {condition.start_step}" if condition.start_step else ""
    return f"id_weight {condition.id_weight:g}{start}"


def _cell(figure: Figure, counted: bool = False) -> str:
    if not math.isfinite(figure.value):
        return ""
    error = f" ± {figure.error:.3f}" if math.isfinite(figure.error) else ""
    return f"{figure.value:.3f}{error}" + (f" (n {figure.count})" if counted else "")


def plots(results: Results, folder: Path) -> list[Path]:
    """Two pictures in a folder: tradeoff.png and conditions.png. Returns their paths.

    tradeoff: likeness against adherence (or, without a drawn world, CLIP-T) as the weight and the first step vary.
    conditions: the main figures side by side.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with pyplot.rc_context(_style()):
        for name, draw in (("tradeoff", _tradeoff), ("conditions", _bars)):
            figure = draw(results, pyplot)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160)
            pyplot.close(figure)
    return paths


def _style() -> Any:
    return {
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
    }


def _tradeoff(results: Results, pyplot: Any) -> Any:
    weights = sorted((c for c in results.by_condition if not c.start_step), key=lambda c: c.id_weight)
    starts = sorted((c for c in results.by_condition if c.id_weight == FULL.id_weight), key=lambda c: c.start_step)
    follows = next((name for name in ("adherence", "clip_t") if _measured(results, FULL, name)), "adherence")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.25, 1))
    _curve(left, results, weights, follows, [f"{c.id_weight:g}" for c in weights], LIKENESS, "id_weight")
    if len(starts) > 1:
        _curve(
            left, results, starts, follows, [f"{c.start_step}" for c in starts], ADHERENCE, "start_step (id_weight 1)"
        )
    if _known(results.ceiling.get("likeness")):
        left.axhline(results.ceiling["likeness"].value, color=MUTED, linestyle=":", label="the truth, autoencoded")
    left.set(xlabel=f"prompt followed: {ROWS[follows]}", ylabel="likeness to a second photo")
    left.legend(loc="best")
    for name, colour in (("likeness", LIKENESS), (follows, ADHERENCE)):
        found = [results.by_condition[c][name] for c in weights]
        right.errorbar(
            [c.id_weight for c in weights],
            [f.value for f in found],
            [f.error for f in found],
            marker="o",
            color=colour,
            label=ROWS[name],
            capsize=2,
        )
    right.set(xlabel="id_weight")
    right.legend(loc="best")
    return figure


def _curve(  # noqa: PLR0913 - a line of a plot: its points, their labels and its looks
    axes: Any, results: Results, line: Sequence[Condition], follows: str, labels: list[str], colour: str, name: str
) -> None:
    found = [(results.by_condition[c][follows], results.by_condition[c]["likeness"]) for c in line]
    x, y = [f.value for f, _ in found], [f.value for _, f in found]
    axes.errorbar(
        x,
        y,
        xerr=[f.error for f, _ in found],
        yerr=[f.error for _, f in found],
        marker="o",
        color=colour,
        ecolor=colour,
        elinewidth=0.6,
        label=name,
    )
    for label, place in zip(labels, zip(x, y, strict=True), strict=True):
        if all(math.isfinite(value) for value in place):
            axes.annotate(label, place, textcoords="offset points", xytext=(6, 4), fontsize=8, color=colour)


def _bars(results: Results, pyplot: Any) -> Any:
    names = [name for name in ROWS if any(_measured(results, c, name) for c in results.by_condition)]
    conditions = list(results.by_condition)
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(names) * max(1, len(conditions) / 3) + 1))
    height = 0.8 / len(conditions)
    shades = pyplot.get_cmap("viridis")
    for place, condition in enumerate(conditions):
        found = [results.by_condition[condition][name] for name in names]
        axes.barh(
            [row + place * height for row in range(len(names))],
            [f.value for f in found],
            height,
            xerr=[f.error for f in found],
            error_kw={"elinewidth": 0.7, "ecolor": INK},
            color=shades(0.15 + 0.7 * place / max(1, len(conditions) - 1)),
            label=_heading(condition),
        )
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], [ROWS[name] for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _measured(results: Results, condition: Condition, name: str) -> bool:
    return _known(results.by_condition.get(condition, {}).get(name))


def _known(figure: Figure | None) -> bool:
    return figure is not None and math.isfinite(figure.value)
