"""Checkpoints: model files -> networks in eval mode and without gradients, on the device and in the dtype that is set.

Nothing here reaches for the network: the files are those that weights.py found. safetensors wherever they exist; the
one pickle, EVA-CLIP's original file, is read with weights_only=True. A tensor too many, too few or of another shape is
an error.
"""

import contextlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline import quantised, weights
from pipeline.errors import SettingsInvalid, WeightsCorrupt, WeightsMissing
from pipeline.models import single_file
from pipeline.models.single_file import State
from pipeline.models.sizes import MINIATURE, OFFICIAL, Sizes
from pipeline.settings import Settings
from pipeline.weights import WeightFiles

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    from pipeline.models.eva_clip import EvaClip
    from pipeline.models.pulid import IDFormer, PulidCrossAttention

Module = TypeVar("Module", bound=nn.Module)

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
T5_VOCABULARIES = ("tokenizer.json", "spiece.model")
CLIP_VOCABULARIES = ("tokenizer.json", "vocab.json")


def files(settings: Settings) -> WeightFiles:
    """The preset's model files. Raises WeightsCorrupt (the manifest)."""
    return weights.locate(settings)


def sizes(settings: Settings) -> Sizes:
    """The sizes of the preset's identity networks."""
    return MINIATURE if settings.preset == "miniature" else OFFICIAL


def device(settings: Settings) -> torch.device:
    """Where the networks run. Raises SettingsInvalid where the set device is not there."""
    name = settings.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise SettingsInvalid(f"PULID_DEVICE is {name}, which torch cannot use here; set it to auto or cpu.") from error
    return torch.device(name)


def dtype(settings: Settings) -> torch.dtype:
    """The number type of the networks: as set, or bfloat16 on a CUDA device and float32 elsewhere."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device(settings).type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]


def on_host(settings: Settings) -> Settings:
    """The settings with which to read what the device cannot hold as it is: into host memory, in the same dtype."""
    return settings.model_copy(update={"device": "cpu", "dtype": str(dtype(settings)).removeprefix("torch.")})


def load_flux(files: WeightFiles, settings: Settings) -> "FluxTransformer2DModel":
    """FLUX's transformer from a diffusers folder, `flux1-*.safetensors`, ComfyUI's float8 single file or a GGUF file.

    In the form that `acceleration` sets. Raises WeightsMissing, WeightsCorrupt, SettingsInvalid.
    """
    from diffusers import FluxTransformer2DModel

    quantised.check(settings, device(settings))
    reading = on_host(settings) if quantised.reads_on_host(settings, device(settings)) else settings
    path = _existing(files.path("flux"))
    with _naming(path):
        if quantised.is_gguf(path):
            model = _frozen(quantised.load_gguf(path, dtype(settings)))
        elif path.is_dir():
            config, state = _diffusers_folder(path, "transformer", FluxTransformer2DModel, reading)
            model = _assign(lambda: FluxTransformer2DModel.from_config(config), state, reading)
        else:
            config, state = single_file.flux(_read([path], reading, single_file.FLUX_PREFIXES), dtype(settings))
            model = _assign(lambda: FluxTransformer2DModel.from_config(config), state, reading)
        if model.config.in_channels != model.out_channels:
            raise WeightsCorrupt("it is a FLUX model for filling or control, where a text-to-image one is needed")
    quantised.place(model, device(settings), settings)
    return model


def load_vae(files: WeightFiles, settings: Settings) -> "AutoencoderKL":
    """FLUX's autoencoder from a diffusers folder or `ae.safetensors`. Raises WeightsMissing, WeightsCorrupt."""
    from diffusers import AutoencoderKL

    path = _existing(files.path("vae"))
    with _naming(path):
        if path.is_dir():
            config, state = _diffusers_folder(path, "vae", AutoencoderKL, settings)
        else:
            config, state = single_file.autoencoder(_read([path], settings, single_file.VAE_PREFIXES))
        return _assign(lambda: AutoencoderKL.from_config(config), state, settings)


def load_t5(files: WeightFiles, settings: Settings) -> "tuple[T5Tokenizer, T5EncoderModel]":
    """T5's tokenizer and encoder from a folder. Raises WeightsMissing, WeightsCorrupt."""
    from transformers import T5EncoderModel, T5Tokenizer

    folder = _existing(files.path("t5"))
    return _tokenizer(T5Tokenizer, folder, T5_VOCABULARIES), _transformers_folder(T5EncoderModel, folder, settings)


def load_clip(files: WeightFiles, settings: Settings) -> "tuple[CLIPTokenizer, CLIPTextModel]":
    """CLIP's tokenizer and text tower from a folder, a whole CLIP's too. Raises WeightsMissing, WeightsCorrupt."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = _existing(files.path("clip"))
    return _tokenizer(CLIPTokenizer, folder, CLIP_VOCABULARIES), _transformers_folder(CLIPTextModel, folder, settings)


def load_whole_clip(folder: Path, settings: Settings) -> "tuple[CLIPTokenizer, CLIPModel]":
    """CLIP's tokenizer and both towers from a folder, for measuring. Raises WeightsMissing, WeightsCorrupt."""
    from transformers import CLIPModel, CLIPTokenizer

    _existing(folder)
    return _tokenizer(CLIPTokenizer, folder, CLIP_VOCABULARIES), _transformers_folder(CLIPModel, folder, settings)


def load_eva_clip(files: WeightFiles, settings: Settings) -> "EvaClip":
    """EVA-CLIP's picture tower from the original `.pt`, or from open_clip's safetensors.

    Raises WeightsMissing, WeightsCorrupt.
    """
    from pipeline.models.eva_clip import EvaClip

    path = _existing(files.path("eva_clip"))
    with _naming(path):
        if path.suffix == ".safetensors":
            state = _read([path], settings, ("visual.trunk.", "visual."))  # open_clip's names, the original's
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise WeightsCorrupt("it does not hold tensors by name")
        tower = EvaClip.from_state_dict(state, **sizes(settings).eva_clip)
    return _frozen(tower.to(device(settings), dtype(settings)))


def load_idformer(files: WeightFiles, settings: Settings) -> "IDFormer":
    """PuLID's identity encoder, alone. Raises WeightsMissing, WeightsCorrupt."""
    from pipeline.models.pulid import IDFormer

    path = _existing(files.path("pulid"))
    with _naming(path):
        state = _pulid(path, settings, "pulid_encoder.")
        return _assign(lambda: IDFormer(**sizes(settings).idformer), state, settings)


def load_cross_attentions(files: WeightFiles, settings: Settings) -> "list[PulidCrossAttention]":
    """PuLID's cross-attentions, in order. Raises WeightsMissing, WeightsCorrupt."""
    from pipeline.models.pulid import PulidCrossAttention

    path = _existing(files.path("pulid"))
    with _naming(path):
        states: dict[str, State] = {}
        for key, tensor in _pulid(path, settings, "pulid_ca.").items():
            index, _, name = key.partition(".")
            states.setdefault(index, {})[name] = tensor
        numbers = [str(number) for number in range(len(states))]
        if not states or set(numbers) != states.keys():
            raise WeightsCorrupt("its cross-attentions are not numbered from 0 without a gap")
        size = sizes(settings).cross_attention
        return [_assign(lambda: PulidCrossAttention(**size), states[number], settings) for number in numbers]


def _pulid(path: Path, settings: Settings, module: str) -> State:
    """The tensors of one of PuLID's two modules; a file with any third is another model's."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
    strange = sorted(key for key in names if not key.startswith(("pulid_encoder.", "pulid_ca.")))
    if strange:
        raise WeightsCorrupt(f"{len(strange)} of its tensors are unknown: {', '.join(strange[:3])}")
    return _read([path], settings, (module,))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise WeightsMissing(f"{path} is missing; `pulid weights verify` says what to do.")
    return path


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Every way in which a file turns out to be cut off, altered or of another model, as WeightsCorrupt naming it."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but not the file's fault
        raise
    except (
        *(WeightsCorrupt, SafetensorError, pickle.UnpicklingError, EOFError),
        *(KeyError, IndexError, ValueError, RuntimeError, TypeError),  # a converter or a constructor met another model
    ) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300].rstrip(".")
        raise WeightsCorrupt(f"{path} cannot be used: {reason}. `pulid weights verify` says what to do.") from error


def _read(paths: Iterable[Path], settings: Settings, prefixes: tuple[str, ...] = ()) -> State:
    """The tensors of safetensors files, on the device; where keys have one of the prefixes only those, without it."""
    state: State = {}
    for path in paths:
        with safe_open(_existing(path), framework="pt", device=str(device(settings))) as file:
            keys = list(file.keys())
            prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)), "")
            state.update({key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)})
    return state


def _diffusers_folder(path: Path, part: str, model: Any, settings: Settings) -> tuple[dict[str, Any], State]:
    """The configuration and tensors of a model's own folder, or of the folder `part` in a whole pipeline's."""
    folder = path / part if (path / part).is_dir() else path
    config = json.loads(_existing(folder / "config.json").read_text())
    if config.get("_class_name") != model.__name__:
        raise WeightsCorrupt(f"it holds a {config.get('_class_name')}, where a {model.__name__} is needed")
    index = folder / f"{DIFFUSERS_FILE}.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {DIFFUSERS_FILE}
    return config, _read([folder / name for name in sorted(names)], settings)


def _assign(build: Callable[[], Module], state: State, settings: Settings) -> Module:
    """A network whose tensors are those of `state`, all of them and no others, never holding them twice."""
    with torch.device("meta"):
        model = build()
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    single_file.compare(wanted, {key: tensor.shape for key, tensor in state.items()})
    single_file.dequantise(state, dtype(settings))
    model.load_state_dict(state, assign=True)
    return _frozen(model)


def _frozen(model: Module) -> Module:
    return model.eval().requires_grad_(False)


def _tokenizer(kind: Any, folder: Path, vocabularies: tuple[str, ...]) -> Any:
    # Without a vocabulary transformers builds a tokenizer that knows no words, and says nothing.
    if not any((folder / name).is_file() for name in vocabularies):
        raise WeightsMissing(f"{folder} has no {' or '.join(vocabularies)}; `pulid weights verify` says what to do.")
    with _naming(folder):
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    # text.py pads and cuts by itself; a setting saved in tokenizer.json must not do it first.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _transformers_folder(kind: Any, folder: Path, settings: Settings) -> Any:
    with _naming(folder), _quiet_transformers():
        try:
            model, report = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype(settings), output_loading_info=True
            )
        except OSError as error:
            raise WeightsMissing(
                f"{folder} holds no model in safetensors that can be read; `pulid weights verify` says what to do."
            ) from error
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:3])
            raise WeightsCorrupt(f"{len(report['missing_keys'])} of its tensors are missing: {some}")
    return _frozen(model.to(device(settings)))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars, and without its report of the tensors that are left out on purpose."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
