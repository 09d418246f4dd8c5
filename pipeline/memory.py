"""What each memory mode keeps on the card, counted on the meta device from FLUX.1-dev's real configuration.

Counted are all weights, and the tensors that one step, or the decoding, holds at its worst moment. Not counted, as only
a GPU can show it: the CUDA context, what torch's allocator rounds up, and the workspaces of its libraries.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline import quantised
from pipeline.models.eva_clip import EvaClip
from pipeline.models.flux import IdentityFlux, IdentityRow
from pipeline.models.pulid import IDFormer, PulidCrossAttention
from pipeline.models.sampling import image_ids
from pipeline.settings import EngineSettings, MemoryMode, Settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

EDGE = 1024  # pixels of the picture's sides
TEXT_TOKENS = 128
STEPS = 28
CROSS_ATTENTIONS = 20
# bytes of one weight
BF16, FP8 = 2.0, 1.0
NF4 = 4 / 8 + 1 / 64 + 4 / (64 * 256)  # a byte of scale for 64 weights, and four for 256 scales: arXiv 2305.14314, 3
Q4_K = 144 / 256  # GGUF: 144 bytes hold 256 weights with their scales
QUANTISED = {"cast": FP8, "gguf": Q4_K, "nf4": NF4}  # the blocks' linear layers
CARDS = (8, 12, 16, 24, 32, 48, 80, 96)  # GiB
# Measured by others, on whole FLUX: diffusers' own benchmarks, L40S, one pass of 4096 + 512 tokens,
# huggingface.co/datasets/diffusers/benchmarks. "by arithmetic": docs/settings.md shows it.
SPEED = {
    "resident": "0.49-0.55 s a pass (L40S, diffusers' benchmarks)",
    "lean": "as resident, and 0.26 s a picture for the modulation over PCIe 4 x16 (by arithmetic)",
    "cast": "0.55-0.60 s a pass (the same), about a tenth more",
    "gguf": "not known: every weight is widened in every step",
    "nf4": "0.51-0.57 s a pass (the same), about 4 % more",
}


@dataclass(frozen=True, slots=True)
class Mode:
    """A memory mode: what stays on the card, and the most that drawing adds, in bytes."""

    name: str
    resident: dict[str, float]
    drawing: float

    @property
    def total(self) -> float:
        """Bytes on the card at the worst moment."""
        return sum(self.resident.values()) + self.drawing

    @property
    def card(self) -> int:
        """GiB of the smallest usual card that holds it, a tenth of the card left for what is not counted."""
        return next(size for size in CARDS if self.total < 0.9 * size * 2**30)


def modes(engine: EngineSettings | None = None) -> list[Mode]:
    """The modes of `acceleration.memory` with these settings, by default each with its own.

    As many rows share a step as may, each a picture of 1024 x 1024 pixels with one person, while another picture is
    decoded; and as many folded identities are kept as may be.
    """
    engine = EngineSettings() if engine is None else engine
    flux, vae, attentions = _networks()
    linears, modulation = quantised.block_linears(flux), quantised.modulation(flux)
    whole, blocks = _count([flux]), _count(linears.values())
    rest = whole - blocks - _count(modulation.values())
    decoding = decoding_bytes(vae)
    # what layers that are quantised hold while they run; FLUX's modulations of all steps
    widened = max(linear.weight.numel() for linear in linears.values()) * BF16
    table = STEPS * sum(layer.out_features for name, layer in modulation.items() if "norm" in name) * BF16
    others = {
        "cross-attentions": _count(attentions) * BF16,
        "text and identity encoders": _count(_encoders()) * BF16,
    }
    each = {name: Settings(engine=engine, acceleration={"memory": name}) for name in get_args(MemoryMode)}
    steps = {rows: step_bytes(flux, attentions, rows) for rows in {one.max_rows for one in each.values()}}
    found = []
    for name, settings in each.items():
        step, identity = steps[settings.max_rows]
        own = {"folded identities, nobody": float(settings.folded_bytes + identity), "VAE": _count([vae]) * BF16}
        drawing = float(step + decoding)
        if name == "resident":
            found.append(Mode(name, {"FLUX": whole * BF16, **own, **others}, drawing))
            continue
        drawing += settings.max_rows * table + (widened if name in QUANTISED else 0)
        found.append(Mode(name, {"FLUX": blocks * QUANTISED.get(name, BF16) + rest * BF16, **own}, drawing))
    return found


def step_bytes(flux: "FluxTransformer2DModel", attentions: list[PulidCrossAttention], rows: int = 1) -> tuple[int, int]:
    """The most that the tensors of one step take beside the weights, and what a folded identity takes."""
    edge = EDGE // 16
    model = IdentityFlux(flux, attentions, modulation="table")
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    with torch.inference_mode():
        times, ids = torch.ones(1, device="meta"), image_ids(edge, edge).to("meta")
        identity = model.prepare(empty(1, 32, 2048))
        row = model.conditioning(times, times, empty(1, 768)).expand(rows, -1)
        people = [IdentityRow(number, identity, torch.ones(1, 1, 1, device="meta")) for number in range(rows)]
        latents, text = empty(rows, edge * edge, 64), empty(rows, TEXT_TOKENS, 4096)
        known = [*flux.parameters(), *_tensors(identity.layers), latents, text, row]
        peak = live_bytes(lambda: model.predict(latents, times.expand(rows), None, text, row, ids, people), known)
    return peak, identity.nbytes


def decoding_bytes(vae: "AutoencoderKL") -> int:
    """The most that the tensors of one decoding take beside the weights."""
    latents = torch.empty(1, 16, EDGE // 8, EDGE // 8, device="meta", dtype=torch.bfloat16)
    with torch.inference_mode():
        return live_bytes(lambda: vae.decode(latents, return_dict=False), [*vae.parameters(), latents])


def live_bytes(run: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """The most bytes that tensors hold at once while `run` runs on the meta device, beside those that are `known`."""
    tally = _Tally(known)
    with _Flash(), tally:
        run()
    return tally.most


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _Flash(TorchFunctionMode):
    """Attention as the GPU's fused kernels do it, which keep no matrix of all pairs; the meta device would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else (kwargs or {})["query"])
        return func(*args, **(kwargs or {}))


def table(found: Iterable[Mode]) -> list[str]:
    """Modes as lines of text."""
    lines = [f"FLUX.1-dev in bfloat16, pictures of {EDGE} x {EDGE}, {TEXT_TOKENS} text tokens; GB are 1e9 bytes."]
    for mode in found:
        lines.append(f"\n{mode.name}: {mode.total / 1e9:.2f} GB, for a card of {mode.card} GiB")
        lines += [f"  {part:<28}{size / 1e9:>7.2f} GB" for part, size in mode.resident.items()]
        lines += [f"  {'drawing, at most':<28}{mode.drawing / 1e9:>7.2f} GB"]
        lines.append(f"  speed: {SPEED[mode.name]}")
    lines.append(
        "\nAll but resident: modulation and cross-attentions in host memory, encoders on CPUs or another card."
    )
    return lines


def _tensors(layers: Iterable[Any]) -> list[Tensor]:
    return [part for layer in layers for part in (layer.to_logits, layer.bias, layer.to_image)]


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _networks() -> "tuple[FluxTransformer2DModel, AutoencoderKL, list[PulidCrossAttention]]":
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        attentions = [PulidCrossAttention().to(torch.bfloat16) for _ in range(CROSS_ATTENTIONS)]
    for network in (flux, vae):
        nn.Module.to(network, torch.bfloat16)  # not diffusers' own, which warns of nothing here
    return flux, vae, attentions


def _encoders() -> list[nn.Module]:
    """T5-XXL's encoder, CLIP-L's text tower, EVA02-CLIP-L's picture tower, IDFormer; by their published sizes."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        return [T5EncoderModel(t5), CLIPTextModel(clip), EvaClip(), IDFormer()]
