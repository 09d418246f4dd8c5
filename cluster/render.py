"""`make render`: writes serve_config.yaml into the RayService manifest, word for word.

python -m cluster.render [--check]   with --check it changes nothing, and exits 1 where the two differ
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "serve_config.yaml"
MANIFEST = ROOT / "cluster" / "kuberay" / "rayservice.yaml"
KEY = "  serveConfigV2: |"


def render(manifest: str, config: str) -> str:
    """The manifest with `config` as its serveConfigV2; raises ValueError where it has not exactly one."""
    lines = manifest.splitlines()
    if lines.count(KEY) != 1:
        raise ValueError(f"the manifest needs exactly one line {KEY!r}")
    start = lines.index(KEY) + 1
    inside = len(KEY) - len(KEY.lstrip()) + 1
    end = next(
        (
            number
            for number in range(start, len(lines))
            if lines[number].strip() and not lines[number].startswith(" " * inside)
        ),
        len(lines),
    )
    block = [f"    {line}".rstrip() for line in config.strip("\n").splitlines()]
    return "\n".join([*lines[:start], *block, *lines[end:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Render, or only look; 1 where the manifest is not what it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.render", description="serve_config.yaml -> rayservice.yaml"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the manifest is out of date")
    check = parser.parse_args(arguments).check
    before = MANIFEST.read_text()
    after = render(before, CONFIG.read_text())
    if check and before != after:
        print(f"{MANIFEST.relative_to(ROOT)} is not rendered from {CONFIG.name}; run make render", file=sys.stderr)
        return 1
    if not check:
        MANIFEST.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
