import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pipeline import checkpoints
from pipeline.errors import SettingsInvalid, WeightsCorrupt, WeightsMissing
from pipeline.miniature import configs
from pipeline.miniature.files import place
from pipeline.models import single_file
from pipeline.models.eva_clip import EvaClip
from pipeline.models.sizes import MINIATURE
from pipeline.settings import Settings
from pipeline.weights import locate
from tests.untrained import CROSS_ATTENTIONS

State = dict[str, Tensor]
CPU = Settings(device="cpu")
FLUX = MappingProxyType(
    {
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 14, 14),
    }
)
DOUBLE_NAMES = MappingProxyType(
    {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
)
SINGLE_NAMES = MappingProxyType(
    {
        "norm.linear": "modulation.lin",
        "proj_out": "linear2",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
    }
)
OUTER_NAMES = MappingProxyType(
    {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
)
VAE = MappingProxyType(  # FLUX.1's own
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
)
# open_clip's names of the tower's weights -> those of the original checkpoint
EVA_CLIP_NAMES = (
    ("visual.trunk.", "visual."),
    (".attn.q_proj.bias", ".attn.q_bias"),
    (".attn.v_proj.bias", ".attn.v_bias"),
    (".attn.norm.", ".attn.inner_attn_ln."),
    (".mlp.fc1_g.", ".mlp.w1."),
    (".mlp.fc1_x.", ".mlp.w2."),
    (".mlp.norm.", ".mlp.ffn_ln."),
    (".mlp.fc2.", ".mlp.w3."),
)
FUSED = (
    (r"transformer_blocks.(\d+).attn.to_q.(.+)", ("to_q", "to_k", "to_v"), "double_blocks.{}.img_attn.qkv.{}"),
    (
        r"transformer_blocks.(\d+).attn.add_q_proj.(.+)",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.{}.txt_attn.qkv.{}",
    ),
    (r"single_transformer_blocks.(\d+).attn.to_q.(.+)", ("to_q", "to_k", "to_v"), "single_blocks.{}.linear1.{}"),
)
VAE_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)


@dataclass(frozen=True)
class Files:
    """Model files in a test's own places."""

    paths: dict[str, Path]

    def path(self, role: str) -> Path:
        return self.paths[role]


def bfl_flux(state: State) -> State:
    """FLUX's tensors under Black Forest Labs' names."""
    result = {}
    for key, tensor in state.items():
        name, leaf = key.rsplit(".", 1)
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
        if block is None:
            scale_first = name == "norm_out.linear"
            tensor = torch.cat(tensor.chunk(2)[::-1]) if scale_first else tensor
            result[f"{OUTER_NAMES[name]}.{leaf}"] = tensor
        elif names := (SINGLE_NAMES if block[1] else DOUBLE_NAMES).get(block[3]):
            leaf = "scale" if "norm." in names else leaf
            result[f"{'single' if block[1] else 'double'}_blocks.{block[2]}.{names}.{leaf}"] = tensor
    for pattern, parts, target in FUSED:
        for key in state:
            if found := re.fullmatch(pattern, key):
                block = key.split(".attn.")[0]
                rows = [state[f"{block}.attn.{part}.{found[2]}"] for part in parts]
                rows += [state[f"{block}.proj_mlp.{found[2]}"]] if "single" in target else []
                result[target.format(found[1], found[2])] = torch.cat(rows)
    return result


def bfl_vae(state: State) -> State:
    """The autoencoder's tensors under Black Forest Labs' names; attention there is a 1x1 convolution."""
    result = {}
    for key, tensor in state.items():
        linear = "attentions.0.to_" in key and key.endswith("weight")
        for pattern, name in VAE_NAMES:
            key = re.sub(pattern, name, key)
        result[key] = tensor[:, :, None, None].clone() if linear else tensor
    return result


def small_flux(**changes: object) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**FLUX, **changes}).eval()


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**VAE, "block_out_channels": (32, 32, 64, 64)}).eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def explicit(config: Mapping[str, object]) -> dict[str, object]:
    """A diffusers configuration without diffusers' private remarks, which tell defaults from what was given."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@torch.inference_mode()
def step(model: FluxTransformer2DModel) -> Tensor:
    """One step of a small FLUX on fixed inputs."""
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(2.0), indexing="ij"), -1)
    return model(
        hidden_states=drawn(1, 6, 64),
        encoder_hidden_states=drawn(1, 5, 48),
        pooled_projections=drawn(1, 24),
        timestep=torch.tensor([0.7]),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([4.0]) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]


def write(state: State, path: Path) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path


def load_flux(path: Path) -> FluxTransformer2DModel:
    return checkpoints.load_flux(Files({"flux": path}), CPU)


@pytest.mark.parametrize("shard", ["10GB", "500KB"])
@pytest.mark.parametrize("part", ["", "transformer"])
def test_flux_from_a_diffusers_folder(tmp_path: Path, shard: str, part: str) -> None:
    """A diffusers folder loads whole or in shards, given itself or as part of a pipeline's folder."""
    model = small_flux()
    model.save_pretrained(tmp_path / part, max_shard_size=shard)
    assert ((tmp_path / part / "diffusion_pytorch_model.safetensors.index.json").exists()) == (shard == "500KB")
    loaded = load_flux(tmp_path)
    assert_close(step(loaded), step(model))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_from_a_file_in_bfls_names(tmp_path: Path, guidance: bool) -> None:
    """flux1-dev and flux1-schnell load from their own single files; guidance is there where its tensors are."""
    model = small_flux(guidance_embeds=guidance)
    loaded = load_flux(write(bfl_flux(model.state_dict()), tmp_path / "flux1.safetensors"))
    assert_close(step(loaded), step(model))
    assert loaded.config.guidance_embeds == guidance


def test_flux_in_the_set_dtype(tmp_path: Path) -> None:
    """The setting's dtype is the model's, whatever the file's."""
    path = write(bfl_flux(small_flux().state_dict()), tmp_path / "flux1.safetensors")
    loaded = checkpoints.load_flux(Files({"flux": path}), Settings(device="cpu", dtype="bfloat16"))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("names", "per_row"),
    [(None, False), (("scale_weight", "scale_input"), False), (("weight_scale", "input_scale"), True)],
)
def test_flux_from_comfyuis_float8_file(
    tmp_path: Path, prefix: str, names: tuple[str, str] | None, per_row: bool
) -> None:
    """Float8 weights become weight times scale, with either of ComfyUI's names for it, or with none."""
    model = small_flux()
    state = bfl_flux(model.state_dict())
    expected = dict(state)
    for key in [key for key in state if key.endswith("weight") and "blocks." in key]:
        rows = state[key].abs().amax(dim=1, keepdim=True) if per_row else state[key].abs().max()
        scale = rows / 448 if names else torch.tensor(1.0)
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        expected[key] = state[key].float() * scale
        if names:
            state[key.removesuffix("weight") + names[0]] = scale
            state[key.removesuffix("weight") + names[1]] = torch.ones(())
    if names:
        state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        state["single_blocks.0.linear1.comfy_quant"] = torch.tensor(
            list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
        )
    file = {prefix + key: tensor for key, tensor in state.items()}
    if prefix:
        file |= {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5xxl.logit_scale": torch.ones(1)}
    loaded = load_flux(write(file, tmp_path / "fp8.safetensors"))
    reference = load_flux(write(expected, tmp_path / "reference.safetensors"))
    assert_close(step(loaded), step(reference))
    assert torch.nn.functional.cosine_similarity(step(loaded).flatten(), step(model).flatten(), dim=0) > 0.99


def _without_a_tensor(state: State) -> State:
    del state["double_blocks.1.img_attn.proj.weight"]
    return state


DAMAGE: dict[str, tuple[Callable[[State], State], str]] = {
    "missing in the table": (_without_a_tensor, "double_blocks.1.img_attn.proj.weight"),
    "missing block": (
        lambda state: {key: tensor for key, tensor in state.items() if not key.startswith("single_blocks.1.")},
        "single_blocks.1",
    ),
    "one too many": (lambda state: {**state, "lora.weight": torch.ones(2)}, "unknown: lora.weight"),
    "another shape": (lambda state: {**state, "img_in.bias": torch.ones(3)}, "of another shape: x_embedder.bias"),
    "cut linear1": (lambda state: {**state, "single_blocks.0.linear1.bias": torch.ones(9)}, "cannot be used"),
    "integers": (lambda state: {**state, "img_in.weight": torch.ones(64, 64, dtype=torch.uint8)}, "img_in.weight"),
    "scale alone": (lambda state: {**state, "nowhere.scale_weight": torch.ones(())}, "nowhere"),
    "another model": (lambda state: {"unet.conv.weight": torch.ones(2)}, "img_in.weight"),
    "fill model": (lambda state: {**state, "img_in.weight": torch.ones(64, 384)}, "filling or control"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_flux_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    """A file with a tensor missing, unknown or misshapen raises WeightsCorrupt that names the file and the tensor."""
    spoil, named = DAMAGE[damage]
    path = write(spoil(bfl_flux(small_flux().state_dict())), tmp_path / "flux1.safetensors")
    with pytest.raises(WeightsCorrupt) as caught:
        load_flux(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF\x03\x00\x00\x00", b"<html>please log in</html>" * 9])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    """Bytes of another kind raise WeightsCorrupt."""
    (tmp_path / "flux1.safetensors").write_bytes(content)
    with pytest.raises(WeightsCorrupt, match=r"flux1\.safetensors cannot be used"):
        load_flux(tmp_path / "flux1.safetensors")


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    """A download that stopped early raises WeightsCorrupt."""
    path = write(bfl_flux(small_flux().state_dict()), tmp_path / "flux1.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsCorrupt, match=r"flux1\.safetensors cannot be used"):
        load_flux(path)


def test_folders_that_do_not_hold_flux(tmp_path: Path) -> None:
    """An absent folder, one without tensors or with a shard gone is missing; one of another class is corrupt."""
    with pytest.raises(WeightsMissing, match="nowhere is missing"):
        load_flux(tmp_path / "nowhere")
    with pytest.raises(WeightsMissing, match="config.json is missing"):
        load_flux(tmp_path)
    small_flux().save_pretrained(tmp_path, max_shard_size="500KB")
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsMissing, match="00002-of-"):
        load_flux(tmp_path)
    small_vae().save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsCorrupt, match="AutoencoderKL"):
        load_flux(tmp_path / "other")


def test_the_real_flux_has_the_real_size() -> None:
    """A file with FLUX.1-dev's shapes gives FLUX.1-dev's configuration: 11,901,408,320 parameters in 780 tensors."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    state = bfl_flux(model.state_dict())
    assert len(state) == 780
    config, converted = single_file.flux(state, torch.bfloat16)
    with torch.device("meta"):
        rebuilt = FluxTransformer2DModel.from_config(config)
    assert sum(tensor.numel() for tensor in converted.values()) == 11_901_408_320
    shapes = {key: tensor.shape for key, tensor in converted.items()}
    assert shapes == {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}
    assert explicit(rebuilt.config) | {"out_channels": None} == explicit(model.config)


@pytest.mark.parametrize("prefix", [None, "", "vae.", "first_stage_model."])
def test_vae_from_a_folder_and_from_a_file(tmp_path: Path, prefix: str | None) -> None:
    """The autoencoder loads from diffusers' folder and from BFL's names, in a file of its own or beside others."""
    model = small_vae()
    path = tmp_path
    if prefix is None:
        model.save_pretrained(tmp_path)
    else:
        state = {prefix + key: tensor for key, tensor in bfl_vae(model.state_dict()).items()}
        path = write(state, tmp_path / "ae.safetensors")
    loaded = checkpoints.load_vae(Files({"vae": path}), CPU)
    latents = drawn(1, 16, 4, 4)
    with torch.inference_mode():
        assert_close(loaded.decode(latents).sample, model.decode(latents).sample)
        picture = drawn(1, 3, 32, 32)
        assert_close(loaded.encode(picture).latent_dist.mean, model.encode(picture).latent_dist.mean)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.3611, 0.1159)


def test_a_damaged_vae_is_refused(tmp_path: Path) -> None:
    """A tensor that is missing from the autoencoder's file is named."""
    state = bfl_vae(small_vae().state_dict())
    del state["decoder.mid.attn_1.q.weight"]
    with pytest.raises(WeightsCorrupt, match=r"missing: decoder\.mid_block\.attentions\.0\.to_q\.weight"):
        checkpoints.load_vae(Files({"vae": write(state, tmp_path / "ae.safetensors")}), CPU)


def test_the_real_vae_has_the_real_size() -> None:
    """A file with FLUX's autoencoder's shapes gives its configuration: 83,819,683 parameters in 244 tensors."""
    with torch.device("meta"):
        model = AutoencoderKL(**VAE)
        config, converted = single_file.autoencoder(bfl_vae(model.state_dict()))
        rebuilt = AutoencoderKL.from_config(config)
    assert len(converted) == 244
    assert sum(parameter.numel() for parameter in rebuilt.parameters()) == 83_819_683
    assert explicit(rebuilt.config) == explicit(model.config)


def test_clip_from_a_whole_clip(tmp_path: Path, untrained: Path) -> None:
    """openai/clip-vit-large-patch14 holds a picture tower too; the text tower is taken out of it."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config={**configs.CLIP_TEXT, "vocab_size": 514}, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    assert any(key.startswith("text_model.") for key in load_file(tmp_path / "model.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((untrained / "clip" / name).read_bytes())
    _, text = checkpoints.load_clip(Files({"clip": tmp_path}), CPU)
    ids = torch.tensor([[512, 5, 6, 513]])
    with torch.inference_mode():
        assert_close(text(ids).last_hidden_state, whole.text_model(ids).last_hidden_state)


def test_clip_under_its_published_names(tmp_path: Path, untrained: Path) -> None:
    """The text tower alone, as FLUX.1's own folder has it, names its tensors `text_model.*`."""
    for file in (untrained / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _, whole = checkpoints.load_clip(Files({"clip": tmp_path}), CPU)
    whole.config.save_pretrained(tmp_path)
    published = {f"text_model.{key}": tensor for key, tensor in whole.state_dict().items()}
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, text = checkpoints.load_clip(Files({"clip": tmp_path}), CPU)
    for key, tensor in text.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key])


def test_t5_from_a_whole_t5(tmp_path: Path, untrained: Path) -> None:
    """A T5 with its decoder gives its encoder, the embedding shared as ever."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(T5Config(**configs.T5, vocab_size=300)).eval()
    whole.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((untrained / "t5" / name).read_bytes())
    _, encoder = checkpoints.load_t5(Files({"t5": tmp_path}), CPU)
    ids = torch.tensor([[7, 8, 1, 0]])
    with torch.inference_mode():
        assert_close(encoder(ids).last_hidden_state, whole.encoder(ids).last_hidden_state)


def test_t5s_tokenizer_from_sentencepiece(tmp_path: Path) -> None:
    """A folder with `spiece.model` alone, as T5 is published, gives sentencepiece's own ids and the end token."""
    import sentencepiece

    lines = ["portrait of a man in the garden", "a woman with a red hat, cinematic colour"] * 50
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=30,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    from transformers import T5Tokenizer

    tokenizer = checkpoints._tokenizer(T5Tokenizer, tmp_path, checkpoints.T5_VOCABULARIES)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for prompt in ("portrait of a woman", "\ufb01ne  red\n hat", ""):
        assert tokenizer(prompt).input_ids == [*reference.encode(prompt), 1]


@pytest.mark.parametrize(
    ("role", "gone"), [("t5", "tokenizer.json"), ("clip", "tokenizer.json"), ("t5", "model.safetensors")]
)
def test_text_encoders_with_a_file_gone(tmp_path: Path, untrained: Path, role: str, gone: str) -> None:
    """A folder without tokenizer or tensors is WeightsMissing, never a tokenizer that knows no words."""
    for file in (untrained / role).iterdir():
        if file.name != gone:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WeightsMissing, match="pulid weights verify"):
        {"t5": checkpoints.load_t5, "clip": checkpoints.load_clip}[role](Files({role: tmp_path}), CPU)


@pytest.mark.parametrize("role", ["t5", "clip"])
def test_text_encoders_with_a_tensor_gone(tmp_path: Path, untrained: Path, role: str) -> None:
    """A missing tensor raises WeightsCorrupt and is named; nothing is filled in at random."""
    for file in (untrained / role).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in sorted(state) if key.endswith("layer_norm1.weight") or "SelfAttention.q" in key)
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsCorrupt, match=r"1 of its tensors are missing: .*(layer_norm1\.weight|SelfAttention\.q)"):
        {"t5": checkpoints.load_t5, "clip": checkpoints.load_clip}[role](Files({role: tmp_path}), CPU)


def original_eva_clip(folder: Path) -> State:
    """The miniature's tower under the names of EVA02_CLIP_L_336_psz14_s6B.pt."""
    original = {}
    for name, tensor in load_file(locate(Settings(miniature_dir=folder)).path("eva_clip")).items():
        for ours, theirs in EVA_CLIP_NAMES:
            name = name.replace(ours, theirs)
        original[name] = tensor
    return original


def test_eva_clip_in_its_three_forms(tmp_path: Path, untrained: Path) -> None:
    """The original pickle, the same as safetensors, and open_clip's names give one tower."""
    original = original_eva_clip(untrained)
    assert all(tensor.dtype == torch.float16 for tensor in original.values())
    reference = EvaClip.from_state_dict({key: tensor.float() for key, tensor in original.items()}, **MINIATURE.eva_clip)
    rope = {f"visual.rope.freqs_{name}": torch.zeros(576, 32) for name in ("cos", "sin")}
    text = {"text.token_embedding.weight": torch.ones(3, 4).half(), "logit_scale": torch.ones(())}
    torch.save({**original, **rope, **text}, tmp_path / "original.pt")
    write({**original, **text}, tmp_path / "original.safetensors")
    trunk = {f"visual.trunk.{key}": tensor for key, tensor in reference.trunk.state_dict().items()}
    write({**trunk, **text}, tmp_path / "open_clip.safetensors")
    for path in sorted(tmp_path.iterdir()):
        tower = checkpoints.load_eva_clip(Files({"eva_clip": path}), CPU)
        assert not any(parameter.requires_grad for parameter in tower.parameters())
        for key, tensor in reference.state_dict().items():
            assert torch.equal(tower.state_dict()[key], tensor), (path.name, key)


class Exploit:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("a pickle ran code",)


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EVA-CLIP's pickle is read as tensors only: anything else in it is refused, and nothing runs."""
    torch.save({"visual.cls_token": Exploit()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "zip.pt").read_bytes()[:300])
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    for name in ("zip.pt", "bare.pt", "cut.pt", "list.pt"):
        with pytest.raises(WeightsCorrupt, match=f"{name} cannot be used"):
            checkpoints.load_eva_clip(Files({"eva_clip": tmp_path / name}), CPU)
    assert "ran code" not in capsys.readouterr().out


def test_an_eva_clip_of_another_size_is_refused(untrained: Path) -> None:
    """The miniature's tower is not taken for the official one."""
    with pytest.raises(WeightsCorrupt, match="cannot be used"):
        checkpoints.load_eva_clip(
            Files({"eva_clip": place(untrained, "eva_clip")}), Settings(preset="flux-dev", device="cpu")
        )


def test_pulid_is_loaded_strictly(tmp_path: Path, untrained: Path) -> None:
    """Cross-attentions come in their numbers' order; a tensor missing, a number missing or a stranger is refused."""
    state = load_file(place(untrained, "pulid"))
    attentions = checkpoints.load_cross_attentions(Files({"pulid": place(untrained, "pulid")}), CPU)
    assert len(attentions) == CROSS_ATTENTIONS
    for index, attention in enumerate(attentions):
        assert torch.equal(attention.to_q.weight, state[f"pulid_ca.{index}.to_q.weight"])
    for lost, load, named in (
        ("pulid_encoder.latents", checkpoints.load_idformer, "missing: latents"),
        ("pulid_ca.1.to_q.weight", checkpoints.load_cross_attentions, "missing: to_q.weight"),
        ("pulid_ca.1.", checkpoints.load_cross_attentions, "numbered"),
        ("pulid_ca.", checkpoints.load_cross_attentions, "numbered"),
        ("pulid_encoder.", checkpoints.load_idformer, "missing"),
    ):
        damaged = {key: tensor for key, tensor in state.items() if not key.startswith(lost)}
        with pytest.raises(WeightsCorrupt, match=named):
            load(Files({"pulid": write(damaged, tmp_path / "damaged.safetensors")}), CPU)
    strange = write({**state, "id_adapter.weight": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(WeightsCorrupt, match=r"unknown: id_adapter\.weight"):
        checkpoints.load_idformer(Files({"pulid": strange}), CPU)


def test_device_and_dtype_follow_the_settings() -> None:
    """auto is bfloat16 on a GPU and float32 on a CPU; a device that is not there is refused."""
    there = torch.cuda.is_available()
    assert checkpoints.device(Settings()).type == ("cuda" if there else "cpu")
    assert checkpoints.dtype(Settings()) == (torch.bfloat16 if there else torch.float32)
    assert checkpoints.dtype(Settings(device="cpu")) == torch.float32
    assert checkpoints.dtype(Settings(device="cpu", dtype="float16")) == torch.float16
    if not there:
        with pytest.raises(SettingsInvalid, match="PULID_DEVICE is cuda:1"):
            checkpoints.device(Settings(device="cuda:1"))
