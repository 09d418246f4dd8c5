"""Our modules against the official ones, on weights and inputs made by rule (tests/parity/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from pipeline.curves import Shape
from pipeline.denoise import FluxDenoiser
from pipeline.drawing import Conditioning, Drawing, Generation, Presence
from pipeline.identity import id_cond
from pipeline.models import sampling
from pipeline.models.eva_clip import EvaClip, face_features
from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.models.pulid import IDFormer, PulidCrossAttention
from tests import small
from tests.parity.rule import fill, integers, normal, weight

HERE = Path(__file__).parent / "parity"
TOLERANCE = 1e-4


def expected(name: str) -> dict[str, Tensor]:
    return load_file(HERE / f"{name}.safetensors")


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def eva_clip() -> EvaClip:
    keys = json.loads((HERE / "eva_clip_keys.json").read_text())
    return EvaClip.from_state_dict({key: weight(key, tuple(shape)) for key, shape in keys.items()})


@pytest.fixture(scope="module")
def idformer() -> IDFormer:
    return fill(IDFormer(), "pulid_encoder.").eval()


@torch.no_grad()
def test_eva_clip_reads_the_original_checkpoint(eva_clip):
    """Weights under the original key names give the original tower's pooled vector and hidden states."""
    theirs = expected("eva_clip")
    pooled, hidden = eva_clip(normal("eva.image", (1, 3, 336, 336)))
    assert difference(pooled, theirs["pooled"]) < TOLERANCE
    assert len(hidden) == 5
    for index, states in enumerate(hidden):
        assert states.shape == (1, 577, 1024)
        assert difference(states[:, ::64], theirs[f"hidden.{index}.tokens_every_64"]) < TOLERANCE


@torch.no_grad()
def test_idformer(idformer):
    """IDFormer gives the official identity tokens, and the official unconditional ones for zeros."""
    theirs = expected("idformer")
    hidden = [normal(f"idformer.hidden.{index}", (2, 577, 1024)) for index in range(5)]
    assert difference(idformer(normal("idformer.id_cond", (2, 1280)), hidden), theirs["id_embedding"]) < TOLERANCE
    assert difference(idformer.unconditional(), theirs["uncond_id_embedding"]) < TOLERANCE


@torch.no_grad()
def test_cross_attention():
    """One cross-attention at full size gives the official output."""
    module = fill(PulidCrossAttention(), "pulid_ca.0.")
    ours = module(normal("pulid_ca.id", (1, 32, 2048)), normal("pulid_ca.img", (1, 64, 3072)))
    assert difference(ours, expected("pulid_ca")["out"]) < TOLERANCE


@torch.no_grad()
def test_identity_chain(eva_clip, idformer):
    """From an aligned face and its parsing to identity tokens, every step is the official one."""
    theirs = expected("identity")
    labels = integers("face.labels", (32, 32), 19).repeat_interleave(16, 0).repeat_interleave(16, 1)
    features = face_features(integers("face.aligned_rgb", (512, 512, 3), 256).numpy(), labels.numpy())
    assert difference(features[:, :, ::8, ::8], theirs["face_features_every_8"]) < TOLERANCE
    pooled, hidden = eva_clip(features)
    condition = id_cond(normal("face.arcface", (1, 512)), pooled)
    assert difference(condition, theirs["id_cond"]) < TOLERANCE
    assert difference(idformer(condition, hidden), theirs["id_embedding"]) < TOLERANCE


class SmallFlux:
    """The small FLUX of the vectors and its inputs."""

    def __init__(self) -> None:
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=5,
            num_single_layers=9,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=56,
            pooled_projection_dim=40,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        fill(transformer, "transformer.").eval()
        attentions = [fill(PulidCrossAttention(96, 16, 4, 64), f"pulid_ca.{index}.") for index in range(6)]
        self.model = IdentityFlux(transformer, attentions)
        self.start = normal("flux.img", (1, 36, 64))
        self.positive = normal("flux.txt", (1, 7, 56)), normal("flux.vec", (1, 40))
        self.negative = normal("flux.neg_txt", (1, 7, 56)), normal("flux.neg_vec", (1, 40))
        self.id, self.uncond_id = normal("flux.id", (1, 32, 64)), normal("flux.uncond_id", (1, 32, 64))

    @torch.no_grad()
    def step(self, latents, time, guidance, texts=None, tokens=None, id_weight=1.0) -> Tensor:
        text, pooled = texts or self.positive
        people = [] if tokens is None else [IdentityRows(tokens, torch.tensor(id_weight).reshape(1, 1, 1))]
        times, guidances = torch.tensor([float(time)]), torch.tensor([guidance])
        return self.model.predict(latents, times, guidances, text, pooled, sampling.image_ids(6, 6), people)

    def loop(self, start_step=None, id_weight=1.0, true_cfg=1.0, cfg_step=8) -> Tensor:
        """Eight steps as the engine's painter makes them, identities folded, from the vectors' noise."""
        denoiser = FluxDenoiser(self.model, small.vae(), self.uncond_id, {})
        weight = torch.full((1, 1, 1), id_weight)
        identities = self.model.prepare(self.id), self.model.prepare(self.uncond_id)
        presence = Presence(start_step or 0, 8, *identities, weight)
        positive, negative = (Conditioning(text, (pooled,) * 8) for text, pooled in (self.positive, self.negative))
        generation = Generation(
            shape=Shape(6, 6, 7),
            times=sampling.schedule(8, 36).split(1),
            deltas=sampling.schedule(8, 36).diff().split(1),
            guidance=torch.tensor([4.0]),
            ids=sampling.image_ids(6, 6),
            text_ids=torch.zeros(7, 3),
            positive=positive,
            negative=None if true_cfg == 1.0 else negative,
            true_cfg=true_cfg,
            cfg_step=cfg_step,
            people=() if start_step is None else (presence,),
        )
        drawing = Drawing(None, generation, self.start, None, 0.0)
        for _ in range(8):
            denoiser.painter.advance([drawing])
        return drawing.latents


@pytest.fixture(scope="module")
def flux() -> SmallFlux:
    return SmallFlux()


def test_flux_steps(flux):
    """One step without an identity, with one, and with one at weight 0.7 is the official step."""
    theirs = expected("flux")
    assert difference(flux.step(flux.start, 0.83, 4.0), theirs["step.no_id"]) < TOLERANCE
    assert difference(flux.step(flux.start, 0.83, 4.0, tokens=flux.id), theirs["step.id"]) < TOLERANCE
    weighted = flux.step(flux.start, 0.41, 3.5, tokens=flux.id, id_weight=0.7)
    assert difference(weighted, theirs["step.id_weight_0.7"]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("no_id", {}),
        ("id", {"start_step": 0}),
        ("start_step_2_id_weight_0.8", {"start_step": 2, "id_weight": 0.8}),
        ("true_cfg_3", {"start_step": 1, "true_cfg": 3.0, "cfg_step": 2}),
    ],
)
def test_flux_loops(flux, name, options):
    """Eight steps with every kind of identity and guidance end at the official latents."""
    assert difference(flux.loop(**options), expected("flux")[f"loop.{name}"]) < TOLERANCE


@pytest.mark.parametrize(("steps", "tokens"), [(8, 36), (20, 4096)])
def test_schedule(steps, tokens):
    """The shifted schedule is the official one."""
    assert difference(sampling.schedule(steps, tokens), expected("flux")[f"schedule.steps_{steps}_seq_{tokens}"]) < 1e-6
