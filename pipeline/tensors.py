"""Tensors in a file, as everybody may read it."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, atomically."""
    from safetensors.torch import save

    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # others may be writing it too
    # not save_file, which lets nobody but the writer read
    partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    partial.replace(path)
