"""The house rules of docs/architecture.md, as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "deployments", "cluster", "bench", "studio")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# A module in pipeline/ imports only from those above it.
ORDER = [
    *("errors", "settings", "trace", "request", "network", "webhooks", "s3"),
    *("objects", "objects_local", "objects_memory", "objects_s3"),
    *("fetch", "photos", "presets", "download", "manifest"),
    *(
        "weights",
        "tensors",
        "caches",
        "reading",
        "models",
        "miniature",
        "quantised",
        "checkpoints",
        "face_models",
        "faces",
        "picture",
        "identity",
        "text",
    ),
    *("curves", "compiling", "rehearsal"),
    *("events", "schedule", "engine", "drawing", "passes", "painter", "acceleration", "context_parallel", "memory"),
    *("denoise", "training", "stored", "store", "jobs", "job_store", "progress", "identities", "uploads", "flow"),
    "evaluation",
]
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "open_clip", "timm", "insightface", "onnxruntime"}
HEAVY |= {"facexlib", "safetensors", "skimage"}
MAY_COMPUTE = ("checkpoints", "face_models", "identity", "text", "denoise", "models", "miniature", "training")
MAY_COMPUTE += ("evaluation",)
MAY_COMPUTE += ("compiling", "rehearsal", "identities")
MAY_COMPUTE += ("tensors", "passes", "painter", "quantised", "acceleration", "context_parallel", "memory")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[tuple[str, bool]]:
    """The modules a file imports, each with whether it does so while it is being imported itself."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pipeline import store` means pipeline.store; `from pipeline.store import Store` means pipeline.store
            names = [f"pipeline.{alias.name}" for alias in node.names] if node.module == "pipeline" else [node.module]
            found += [(module, id(node) not in late) for module in names]
    return found


def part(path: Path) -> str:
    """The module or package of pipeline/ that a file belongs to."""
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_who_may_import_what(path):
    """pipeline/ knows no Ray and no FastAPI, the HTTP layer no Ray and no torch; heavy libraries keep to the stages."""
    roots = {module.split(".")[0] for module, _ in imports(path)}
    if name(path).startswith("pipeline/"):
        assert not roots & {"ray", "fastapi"}
        if part(path) not in MAY_COMPUTE:
            assert not roots & HEAVY
    if name(path) == "deployments/api.py":
        assert not roots & {"ray", *HEAVY}
    if name(path).startswith("deployments/"):
        assert not roots & HEAVY


@pytest.mark.parametrize("path", [p for p in SOURCES if name(p).startswith("pipeline/")], ids=name)
def test_imports_go_one_way(path):
    """A module in pipeline/ imports only from those above it in the list of docs/architecture.md."""
    own = part(path)
    if own == "__init__":
        return
    for module, _ in imports(path):
        if module.startswith("pipeline.") and (other := module.split(".")[1]) != own:
            assert ORDER.index(other) < ORDER.index(own), f"{name(path)} imports {module}"


def test_the_list_is_the_one_in_the_documentation():
    """docs/architecture.md names every module of pipeline/."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "pipeline").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert path.name in text, f"docs/architecture.md does not name pipeline/{path.name}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_size_budget(path):
    """A file has at most 300 lines, a function at most 60."""
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_swallowed(path):
    """No handler catches an exception without a word."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not all(isinstance(statement, ast.Pass) for statement in node.body)


def test_the_ingress_never_imports_torch():
    """What the ingress imports loads none of the model libraries."""
    code = f"import sys, deployments.ingress, deployments.api; print(*({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""
