"""Presets: which model files exist, where they come from, what their licences are. A table, nothing else.

Folders are relative to the weights folder and the same for every preset, so presets share what they have in common:

    antelopev2/  facexlib/  eva_clip/  pulid/  flux/  vae/  t5/  clip/

The miniature has the same folders in a place of its own, inside this package.

A sha256 or size is here only where a public source states it, named beside it; None means that we know of none. The
first download is then trusted, and every later one is held to it (weights.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.settings import PresetName

Host = Literal["hub", "github"]


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence: its name, the page where its text stands, and whether commercial use is free."""

    name: str
    page: str
    commercial: bool


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file: exact `size` and `sha256` where known; `about` is a rounded size, for people and for the disk check."""

    name: str
    size: int | None = None
    sha256: str | None = None
    about: int = 0

    @property
    def room(self) -> int:
        """The bytes it takes, as exactly as we know."""
        return self.size if self.size is not None else self.about


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip from a GitHub release that holds the same files, in whatever folder."""

    repository: str
    revision: str
    file: ModelFile


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The files of one role. One file: the role's path is that file; several, or a whole folder (): it is the folder.

    `revision` is a commit or branch on the hub, a release's tag on GitHub. `archive` is the second choice. Without a
    repository nothing is fetched: the files come with this package. `draws`: pictures are made with it.
    """

    role: str
    folder: str
    files: tuple[ModelFile, ...]
    licence: Licence
    repository: str | None = None
    revision: str = "main"
    host: Host = "hub"
    gated: bool = False
    archive: Archive | None = None
    draws: bool = True


@dataclass(frozen=True, slots=True)
class Preset:
    """A set of models that work together, and what differs about its FLUX.

    `guidance`: the transformer has a guidance embedding. `shift`: its schedule is shifted with the picture's size.
    `shipped`: its files come with this package.
    """

    name: PresetName
    description: str
    specs: tuple[ModelSpec, ...]
    guidance: bool = True
    shift: bool = True
    shipped: bool = False


OURS = Licence("Apache-2.0", "LICENSE in this project", commercial=True)
FLUX_DEV = Licence("FLUX.1 [dev] Non-Commercial", "https://huggingface.co/black-forest-labs/FLUX.1-dev", False)
INSIGHTFACE = Licence(
    "insightface models: non-commercial research only", "https://github.com/deepinsight/insightface#license", False
)
FACEXLIB = Licence("MIT", "https://github.com/xinntao/facexlib/blob/master/LICENSE", True)

# sha256 and size: black-forest-labs/flux, docs/text-to-image.md; the hub's listing. Revisions: the hub's commits.
DEV = ModelSpec(
    "flux",
    "flux",
    (
        ModelFile(
            "flux1-dev.safetensors",
            23_802_932_552,
            "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7",
        ),
    ),
    FLUX_DEV,
    "black-forest-labs/FLUX.1-dev",
    "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    gated=True,
)
# docs/text-to-image.md gives flux1-dev's sha256 for Krea too; as the files differ, that is no sha256 of Krea's
KREA = replace(
    DEV,
    files=(ModelFile("flux1-krea-dev.safetensors", about=23_800_000_000),),
    licence=replace(FLUX_DEV, page="https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev"),
    repository="black-forest-labs/FLUX.1-Krea-dev",
    revision="main",
)
SCHNELL = replace(
    DEV,
    files=(
        ModelFile(
            "flux1-schnell.safetensors",
            23_782_506_688,
            "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a",
        ),
    ),
    licence=Licence("Apache-2.0", "https://huggingface.co/black-forest-labs/FLUX.1-schnell", True),
    repository="black-forest-labs/FLUX.1-schnell",
    revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
)
# One file in all three repositories, under Apache-2.0 by black-forest-labs/flux's README.md; each preset takes it from
# the repository whose gate it has to pass anyway. sha256 and size: the hub's listing, as many model lists repeat it.
AUTOENCODER = ModelSpec(
    "vae",
    "vae",
    (ModelFile("ae.safetensors", 335_304_388, "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38"),),
    Licence("Apache-2.0", "https://github.com/black-forest-labs/flux#models", True),
    DEV.repository,
    DEV.revision,
    gated=True,
)
# sha256 and sizes: model lists that pin this zip and its members; the members' sha256 also in ComfyUI-nunchaku.
ANTELOPE = Archive(
    "deepinsight/insightface",
    "v0.7",
    ModelFile("antelopev2.zip", 360_662_982, "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5"),
)
DETECTOR = ModelSpec(
    "detector",
    "antelopev2",
    (
        ModelFile(
            "scrfd_10g_bnkps.onnx", 16_923_827, "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"
        ),
    ),
    INSIGHTFACE,
    "DIAMONIK7777/antelopev2",  # the one that the official PuLID app reads
    "ba0c3e10f4548361eb9a63265d87ce1140ab5a05",
    archive=ANTELOPE,
)
RECOGNISER = replace(
    DETECTOR,
    role="recogniser",
    files=(
        ModelFile("glintr100.onnx", 260_665_334, "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"),
    ),
)
# sha256: the Arch package facexlib-model and mold's manifest; sizes: model lists that pin the same sha256.
RETINAFACE = ModelSpec(
    "retinaface",
    "facexlib",
    (
        ModelFile(
            "detection_Resnet50_Final.pth",
            109_497_761,
            "6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
        ),
    ),
    FACEXLIB,
    "xinntao/facexlib",
    "v0.1.0",
    "github",
)
PARSING = replace(
    RETINAFACE,
    role="parsing",
    revision="v0.2.0",
    licence=replace(FACEXLIB, name="MIT (trained on CelebAMask-HQ, research data)"),
    files=(
        ModelFile(
            "parsing_bisenet.pth", 53_289_463, "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567"
        ),
    ),
)
# sha256: mold's manifest (crates/mold-core/src/manifest.rs), for both; sizes: model lists.
EVA_CLIP = ModelSpec(
    "eva_clip",
    "eva_clip",
    (
        ModelFile(
            "EVA02_CLIP_L_336_psz14_s6B.pt",
            856_461_210,
            "84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
        ),
    ),
    Licence("MIT", "https://huggingface.co/QuanSun/EVA-CLIP", True),
    "QuanSun/EVA-CLIP",
    "11afd202f2ae80869d6cef18b1ec775e79bd8d12",
)
PULID = ModelSpec(
    "pulid",
    "pulid",
    (
        ModelFile(
            "pulid_flux_v0.9.1.safetensors",
            1_142_099_520,
            "92c41c3af322b02e58e1b32842e4601e08c8f16ec1fe80089dbe957df510f51d",
        ),
    ),
    Licence("Apache-2.0", "https://huggingface.co/guozinan/PuLID", True),
    "guozinan/PuLID",
    "492b1451255dc9d9bc3c857259690b5f8b998d4a",
)
# The files and their rounded sizes: the repository's page at this commit, which shows no sha256.
T5 = ModelSpec(
    "t5",
    "t5",
    (
        ModelFile("config.json", 782),
        ModelFile("model-00001-of-00002.safetensors", about=4_990_000_000),
        ModelFile("model-00002-of-00002.safetensors", about=4_530_000_000),
        ModelFile("model.safetensors.index.json", about=19_900),
        ModelFile("spiece.model", about=792_000),
        ModelFile("added_tokens.json", about=2_590),
        ModelFile("special_tokens_map.json", about=2_540),
        ModelFile("tokenizer_config.json", about=20_600),
    ),
    Licence("Apache-2.0", "https://huggingface.co/XLabs-AI/xflux_text_encoders", True),
    "XLabs-AI/xflux_text_encoders",
    "5ce032c6b9bfe31a4ffb220c8afa147e8de6acea",
)
# sha256: SHA256SUMS lists of this commit, several of which agree.
CLIP = ModelSpec(
    "clip",
    "clip",
    (
        ModelFile("config.json", None, "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a", 4_500),
        ModelFile(
            "model.safetensors", 1_710_540_580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
        ),
        ModelFile("merges.txt", 524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
        ModelFile("vocab.json", None, "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69", 961_000),
        ModelFile("tokenizer.json", 2_224_003, "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4"),
        ModelFile("tokenizer_config.json", None, "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129"),
        ModelFile("special_tokens_map.json", None, "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf"),
    ),
    Licence("MIT", "https://github.com/openai/CLIP/blob/main/LICENSE", True),
    "openai/clip-vit-large-patch14",
    "32bd64288804d66eefd0ccbe215aa642df71cc41",
)
SHARED = (DETECTOR, RECOGNISER, RETINAFACE, PARSING, EVA_CLIP, PULID, T5, CLIP)
WITH_LFW = replace(OURS, name="Apache-2.0 (trained also on 100 faces of LFW, research data)")
MINIATURE = (
    ModelSpec("detector", "antelopev2", (ModelFile("scrfd_miniature.onnx"),), WITH_LFW),
    ModelSpec("recogniser", "antelopev2", (ModelFile("arcface_miniature.onnx"),), OURS),
    ModelSpec("parsing", "facexlib", (ModelFile("parsing_bisenet_miniature.safetensors"),), OURS),
    ModelSpec("eva_clip", "eva_clip", (ModelFile("EVA02_CLIP_miniature.safetensors"),), OURS),
    ModelSpec("pulid", "pulid", (ModelFile("pulid_flux_miniature.safetensors"),), OURS),
    *(ModelSpec(role, role, (), OURS) for role in ("flux", "vae", "t5", "clip")),
    ModelSpec("judge", "judge", (ModelFile("recogniser.onnx"),), OURS, draws=False),
)
# FLUX stands first: a refused gate then shows before the rest is fetched.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "miniature",
            "the same classes, very small, trained on drawn people (the detector also on LFW, research data)",
            MINIATURE,
            shipped=True,
        ),
        Preset("flux-dev", "PuLID on FLUX.1 [dev]", (DEV, AUTOENCODER, *SHARED)),
        Preset(
            "flux-krea-dev",
            "PuLID on FLUX.1 Krea [dev]",
            (KREA, replace(AUTOENCODER, repository=KREA.repository, revision=KREA.revision), *SHARED),
        ),
        Preset(
            "flux-schnell",
            "PuLID on FLUX.1 [schnell], four steps",
            (SCHNELL, replace(AUTOENCODER, repository=SCHNELL.repository, revision=SCHNELL.revision), *SHARED),
            guidance=False,
            shift=False,
        ),
    )
}
