"""A preset's files -> the networks of a training."""

from math import ceil
from pathlib import Path

from pipeline import checkpoints, face_models
from pipeline.errors import SettingsInvalid
from pipeline.models.flux import IdentityFlux
from pipeline.settings import Settings
from pipeline.training.config import TrainingConfig
from pipeline.training.networks import Networks, locate_with, new_pulid
from pipeline.training.recogniser import OnnxNetwork


def load_networks(settings: Settings, config: TrainingConfig, recogniser: Path | None = None) -> Networks:
    """FLUX and EVA-CLIP of the preset, an untrained PuLID, and what the ID loss needs from stage 2 on.

    recogniser: ONNX file of the ID loss's recogniser, another one than the preset's: what is looked at by one net is
    judged by a second. Raises WeightsError, SettingsInvalid.
    """
    files, sizes, device = checkpoints.files(settings), checkpoints.sizes(settings), checkpoints.device(settings)
    transformer = checkpoints.load_flux(files, settings)
    config_of = transformer.config
    count = ceil(config_of.num_layers / sizes.double_interval) + ceil(
        config_of.num_single_layers / sizes.single_interval
    )
    idformer, modules = new_pulid(count, sizes.idformer, sizes.cross_attention, config.seed)
    for module in modules:
        module.to(device)
    flux = IdentityFlux(transformer, modules, sizes.double_interval, sizes.single_interval)
    eva_clip = checkpoints.load_eva_clip(files, settings)
    if config.stage == 1:
        return Networks(flux, idformer.to(device), eva_clip=eva_clip)
    if recogniser is None:
        raise SettingsInvalid("From stage 2 on the ID loss needs a recogniser: an ArcFace net as an ONNX file.")
    return Networks(
        flux,
        idformer.to(device),
        vae=checkpoints.load_vae(files, settings),
        eva_clip=eva_clip,
        recogniser=OnnxNetwork(recogniser).to(device),
        locate=locate_with(face_models.load_models(settings).detector),
    )
