import copy
from pathlib import Path

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from pipeline import checkpoints, quantised
from pipeline.errors import SettingsInvalid, WeightsCorrupt
from pipeline.models.flux import IdentityFlux
from pipeline.models.modulation import Modulation
from pipeline.settings import Settings
from tests import small
from tests.test_checkpoints import Files, bfl_flux, small_flux, step
from tests.test_flux import draw

Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def settings(**acceleration: object) -> Settings:
    return Settings(device="cpu", acceleration=acceleration)


def write_gguf(model: FluxTransformer2DModel, path: Path) -> Path:
    """The model under Black Forest Labs' names, its matrices in Q8_0, as converters write FLUX."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in bfl_flux(model.state_dict()).items():
        form = Q8 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_quantised_of_the_real_flux() -> None:
    """The 418 linear layers inside the blocks; never an embedder, a norm or the last projection."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    chosen = quantised.block_linears(model)
    assert len(chosen) == 19 * 12 + 38 * 5
    assert sum(linear.weight.numel() for linear in chosen.values()) == 19 * 24 * 3072**2 + 38 * 12 * 3072**2
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - chosen.keys()
    assert others - quantised.modulation(model).keys() == {"context_embedder", "x_embedder", "proj_out"}
    norms = [layer for name, layer in quantised.modulation(model).items() if not name.startswith("time_text_embed")]
    assert sum(parameter.numel() for layer in norms for parameter in layer.parameters()) == 344 * 3072 * 3073


def test_cast_weights_are_kept_as_float8_and_used_as_what_they_are_worth() -> None:
    """FLUX with cast weights is, to the bit, FLUX with weights rounded to float8; its modulation is not rounded."""
    rounded, cast = small.transformer(), small.transformer()
    for linear in quantised.block_linears(rounded).values():
        for parameter in linear.parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    quantised.place(cast, torch.device("cpu"), settings(memory="cast"))
    chosen = quantised.block_linears(cast)
    assert {linear.weight.dtype for linear in chosen.values()} == {torch.float8_e4m3fn}
    assert cast.norm_out.linear.weight.dtype == cast.x_embedder.weight.dtype == torch.float32
    expected = draw(IdentityFlux(rounded, small.cross_attentions()))
    assert torch.equal(draw(IdentityFlux(cast, small.cross_attentions())), expected)
    assert not torch.equal(draw(IdentityFlux(small.transformer(), small.cross_attentions())), expected)
    inputs = torch.tensor([0.7, 0.3]), torch.tensor([4.0]), torch.ones(1, 20)
    assert torch.equal(Modulation(cast, host=True).table(*inputs), Modulation(rounded).table(*inputs))


def test_flux_from_a_gguf_file(tmp_path: Path) -> None:
    """It is FLUX with the weights that the file's packed bytes stand for; in memory they stay packed."""
    model = small_flux()
    path = write_gguf(model, tmp_path / "flux.gguf")
    chosen = Settings(device="cpu", flux_file=path, acceleration={"memory": "gguf"})
    loaded = checkpoints.load_flux(Files({"flux": path}), chosen)
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(parameter.data.numpy(), Q8)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, Q8)).half().float()  # as diffusers widens
    torch.testing.assert_close(step(loaded), step(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(step(loaded), step(model), rtol=1e-5, atol=1e-5)
    assert loaded.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
    assert loaded.dtype == loaded.x_embedder.weight.dtype == torch.float32
    inputs = torch.tensor([0.7, 0.3]), torch.tensor([4.0]), torch.ones(1, 24)
    rows = Modulation(loaded, host=True).table(*inputs)
    torch.testing.assert_close(rows, Modulation(expected).table(*inputs), rtol=1e-5, atol=1e-5)


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    """A file that is none, and one of a model with a tensor too few, are refused by name."""
    path = tmp_path / "flux.gguf"
    chosen = Settings(device="cpu", flux_file=path, acceleration={"memory": "gguf"})
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsCorrupt, match=r"flux\.gguf cannot be used"):
        checkpoints.load_flux(Files({"flux": path}), chosen)
    model = small_flux()
    del model.transformer_blocks[0].attn.norm_q.weight
    with pytest.raises(WeightsCorrupt, match="has no"):
        checkpoints.load_flux(Files({"flux": write_gguf(model, path)}), chosen)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"acceleration": {"memory": "gguf"}}, "FLUX_FILE"),
        ({"flux_file": "flux.gguf"}, "MEMORY=gguf"),
        ({"acceleration": {"memory": "lean"}, "engine": {"modulation": "live"}}, "MODULATION to auto or host"),
        ({"acceleration": {"fp8": True, "memory": "cast"}}, "MEMORY to resident or lean"),
        ({"acceleration": {"fp8": True}}, "compute capability 8.9"),
    ],
)
def test_settings_that_cannot_be_had_say_what_to_set(values: dict[str, object], advice: str) -> None:
    """Forms that exclude each other, or that the device lacks, are refused before anything is read."""
    with pytest.raises(SettingsInvalid, match=advice):
        checkpoints.load_flux(Files({"flux": Path("nowhere")}), Settings(device="cpu", **values))


def test_a_library_that_is_not_installed_is_named() -> None:
    """It is said which setting needs what, and which extra installs it."""
    with pytest.raises(SettingsInvalid, match=r"MEMORY=nf4 needs a_library, .*install pulid-serve\[nf4\]"):
        quantised.optional("a_library.that_nobody_has", "PULID_ACCELERATION__MEMORY=nf4", "nf4")


def test_four_bits_are_the_weights_up_to_their_rounding() -> None:
    """The blocks' layers alone are in 4 bits, and FLUX draws what it drew but for a tenth."""
    pytest.importorskip("bitsandbytes", reason="pulid-serve[nf4] is not installed")
    narrow, plain = small_flux(), small_flux()
    quantised.place(narrow, torch.device("cpu"), settings(memory="nf4"))
    packed = {name for name, parameter in narrow.named_parameters() if parameter.dtype == torch.uint8}
    assert packed == {f"{name}.weight" for name in quantised.block_linears(plain)}
    assert not torch.equal(step(narrow), step(plain))
    assert (step(narrow) - step(plain)).norm() < 0.1 * step(plain).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao multiplies rows of float8 on a GPU only")
def test_float8_is_the_layer_up_to_its_rounding() -> None:
    """Weights and activations in float8 with a scale a row: a product is off by some hundredths."""
    pytest.importorskip("torchao", reason="pulid-serve[fp8] is not installed")
    torch.manual_seed(0)
    linear = nn.Linear(64, 128).to("cuda", torch.bfloat16)
    inputs = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    expected = linear(inputs)
    quantised.to_fp8(linear)
    error = (linear(inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({}, False),
        ({"acceleration": {"memory": "lean"}}, True),
        ({"acceleration": {"fp8": True}}, True),
        ({"engine": {"modulation": "host"}}, True),
        ({"engine": {"modulation": "table"}}, False),
    ],
)
def test_what_the_device_is_not_to_hold_is_read_into_host_memory(values: dict[str, object], first: bool) -> None:
    """All of FLUX at once, as its file has it, is for devices only that keep it so."""
    assert quantised.reads_on_host(Settings(**values), torch.device("meta")) == first


@pytest.mark.parametrize(
    "values", [{"acceleration": {"memory": "lean"}}, {"engine": {"modulation": "host"}}, {"engine": {}}]
)
def test_what_stays_in_host_memory(values: dict[str, object]) -> None:
    """The weights of the modulation, in `lean` and where it is `host`; all others go to the device, here meta."""
    model = small.transformer()
    expected = set() if values == {"engine": {}} else set(quantised.modulation(model))
    quantised.place(model, torch.device("meta"), Settings(**values))
    there = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.device.type == "cpu"}
    assert there == expected


def test_host_memory_is_read_into_in_the_dtype_of_the_device() -> None:
    """A CPU's own would be float32, twice as large."""
    host = checkpoints.on_host(Settings(device="auto", dtype="bfloat16"))
    assert (host.device, host.dtype) == ("cpu", "bfloat16")
