"""The stages that make the miniature from nothing, what each needs, and how one of them is run and remembered.

A stage leaves its figures in work/figures/; a stage whose figures are there, from the same plan, is not run again.
Long stages also save themselves as they go, so a build that was cut goes on where it was.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2

from pipeline.miniature.files import write_manifest
from pipeline.training.miniature import adapter, data, detector, eva, flux, idformer, parser, recogniser, text, vae
from pipeline.training.miniature.plan import Plan

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the stages it reads from, the parts of the plan it follows, and what it does in its two folders."""

    name: str
    needs: tuple[str, ...]
    plans: tuple[str, ...]
    run: Callable[..., Figures]  # (work, weights, *parts of the plan)


# The longest way through comes first, so that it starts first where two stages could.
STAGES: tuple[Stage, ...] = (
    Stage("vae", (), ("vae",), vae.train),
    Stage("latents", ("vae",), ("data",), data.make_latents),
    Stage("text", (), ("text",), text.train),
    Stage("flux", ("latents", "text"), ("flux",), flux.train),
    Stage("recogniser", (), ("recogniser",), recogniser.train),
    Stage("faces", (), ("data",), data.make_faces),
    Stage("embeddings", ("faces", "recogniser"), ("data",), data.make_embeddings),
    Stage("eva", ("faces",), ("eva", "data"), eva.train),
    Stage("idformer", ("eva", "embeddings"), ("idformer", "data"), idformer.train),
    Stage("detector", (), ("detector",), detector.train),
    Stage("parser", (), ("parser",), parser.train),
    Stage("flow", ("flux", "idformer"), ("adapter", "data"), adapter.train_flow),
    Stage("identity", ("flow", "detector"), ("adapter", "data"), adapter.train_identity),
    Stage("alignment", ("identity",), ("adapter", "data"), adapter.train_alignment),
)


def ready(done: set[str], begun: set[str]) -> Iterator[Stage]:
    """The stages that can begin now, in the order in which they should."""
    for stage in STAGES:
        if stage.name not in done | begun and done.issuperset(stage.needs):
            yield stage


def remembered(work: Path, plan: Plan) -> dict[str, Figures]:
    """The figures of the stages that are done, by name.

    A stage whose part of the plan was changed is not, and neither is any that reads from it.
    """
    found: dict[str, Figures] = {}
    for stage in STAGES:
        path = _path(work, stage.name)
        if path.exists() and found.keys() >= set(stage.needs):
            entry = json.loads(path.read_text())
            if entry["plan"] == _print(stage, plan):
                found[stage.name] = entry["figures"]
    return found


def run(name: str, work: Path, weights: Path, plan: Plan) -> Figures:
    """Run one stage, whose needs are done, and remember its figures, its seconds among them."""
    stage = next(stage for stage in STAGES if stage.name == name)
    cv2.setNumThreads(1)  # small pictures: cv2's threads would only wait for each other
    started = time.perf_counter()
    figures = stage.run(work, weights, *(getattr(plan, part) for part in stage.plans))
    figures = {**figures, f"{name}_seconds": time.perf_counter() - started}
    path = _path(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"plan": _print(stage, plan), "figures": figures}, indent=1))
    return figures


def run_all(work: Path, weights: Path, plan: Plan) -> dict[str, Figures]:
    """Run every stage that is not done yet in this process, and write the manifest."""
    done = remembered(work, plan)
    while waiting := next(ready(set(done), set()), None):
        done[waiting.name] = run(waiting.name, work, weights, plan)
    write_manifest(weights)
    return done


def _path(work: Path, name: str) -> Path:
    return work / "figures" / f"{name}.json"


def _print(stage: Stage, plan: Plan) -> object:
    """The stage's parts of the plan as JSON has them."""
    return json.loads(json.dumps({part: asdict(getattr(plan, part)) for part in stage.plans}))
