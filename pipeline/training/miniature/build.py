"""The stages that make the miniature from nothing, what each needs, and how one of them is run and remembered.

A stage leaves its figures in work/figures/. One whose figures are there, from the same plan and the same needs, is not
run again. Long stages also save themselves as they go, so a build that was cut goes on where it was; what they saved
for another plan, or from other needs, is thrown away.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2

from pipeline.miniature.files import write_manifest
from pipeline.training.miniature import adapter, data, detector, eva, flux, idformer, parser, recogniser, text, vae
from pipeline.training.miniature.plan import Plan

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the stages it reads from, the parts of the plan it follows, and what it does in its two folders.

    saves: the folders in the work folder in which it saves itself as it goes.
    """

    name: str
    needs: tuple[str, ...]
    plans: tuple[str, ...]
    run: Callable[..., Figures]  # (work, weights, *parts of the plan)
    saves: tuple[str, ...] = ()


# The longest way through comes first, so that it starts first where two stages could.
STAGES: tuple[Stage, ...] = (
    Stage("vae", (), ("vae",), vae.train, ("vae", "decoder")),
    Stage("latents", ("vae",), ("data",), data.make_latents),
    Stage("importance", ("vae", "latents"), (), data.make_importance),
    Stage("text", (), ("text",), text.train, ("clip",)),
    Stage("flux", ("latents", "importance", "text"), ("flux",), flux.train, ("flux", "guidance")),
    Stage("recogniser", (), ("recogniser",), recogniser.train),
    Stage("faces", (), ("data",), data.make_faces),
    Stage("embeddings", ("faces", "recogniser"), ("data",), data.make_embeddings),
    Stage("eva", ("faces",), ("eva", "data"), eva.train, ("eva",)),
    Stage("idformer", ("eva", "embeddings"), ("idformer", "data"), idformer.train, ("idformer",)),
    Stage("detector", (), ("detector",), detector.train),
    Stage("parser", (), ("parser",), parser.train),
    Stage("flow", ("flux", "idformer"), ("adapter", "data"), adapter.train_flow, ("flow",)),
    Stage("identity", ("flow", "detector"), ("adapter", "data"), adapter.train_identity, ("identity",)),
    Stage("alignment", ("identity",), ("adapter", "data"), adapter.train_alignment, ("alignment",)),
)


def ready(done: set[str], begun: set[str]) -> Iterator[Stage]:
    """The stages that can begin now, in the order in which they should."""
    for stage in STAGES:
        if stage.name not in done | begun and done.issuperset(stage.needs):
            yield stage


def remembered(work: Path, plan: Plan) -> dict[str, Figures]:
    """The figures of the stages that are done, by name.

    A stage whose part of the plan was changed is not, and neither is any that read from it.
    """
    found: dict[str, Figures] = {}
    for stage in STAGES:
        path = _figures(work, stage.name)
        if path.exists() and found.keys() >= set(stage.needs):
            entry = json.loads(path.read_text())
            if entry["origin"] == _origin(stage, work, plan):
                found[stage.name] = entry["figures"]
    return found


def run(name: str, work: Path, weights: Path, plan: Plan) -> Figures:
    """Run one stage, whose needs are done, and remember its figures, its seconds among them."""
    stage = next(stage for stage in STAGES if stage.name == name)
    cv2.setNumThreads(1)  # small pictures: cv2's threads would only wait for each other
    origin = _origin(stage, work, plan)
    _begin(stage, work, origin)
    started = time.perf_counter()
    figures = stage.run(work, weights, *(getattr(plan, part) for part in stage.plans))
    figures = {**figures, f"{name}_seconds": time.perf_counter() - started}
    _write(_figures(work, name), {"origin": origin, "figures": figures})
    return figures


def run_all(work: Path, weights: Path, plan: Plan) -> dict[str, Figures]:
    """Run every stage that is not done yet in this process, and write the manifest."""
    done = remembered(work, plan)
    while waiting := next(ready(set(done), set()), None):
        done[waiting.name] = run(waiting.name, work, weights, plan)
    write_manifest(weights)
    return done


def _begin(stage: Stage, work: Path, origin: Any) -> None:
    """Throw away what the stage saved on its way from another origin."""
    marker = work / "figures" / f"{stage.name}.begun"
    if not marker.exists() or json.loads(marker.read_text()) != origin:
        for folder in stage.saves:
            shutil.rmtree(work / folder, ignore_errors=True)
        _write(marker, origin)


def _origin(stage: Stage, work: Path, plan: Plan) -> Any:
    """What a stage follows from: its parts of the plan, and which run of each of its needs; as JSON has them."""
    parts = {part: asdict(getattr(plan, part)) for part in stage.plans}
    needs = {need: hashlib.sha256(_figures(work, need).read_bytes()).hexdigest() for need in stage.needs}
    return json.loads(json.dumps({"plan": parts, "needs": needs}))


def _figures(work: Path, name: str) -> Path:
    return work / "figures" / f"{name}.json"


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)
