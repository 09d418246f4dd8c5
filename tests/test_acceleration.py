import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from pipeline import acceleration, compiling
from pipeline.caches import Cache
from pipeline.curves import Curves, Shape
from pipeline.denoise import FluxDenoiser, load_flux
from pipeline.drawing import Work
from pipeline.errors import SettingsInvalid
from pipeline.identity import Identity
from pipeline.models.flux import IdentityFlux, IdentityRow
from pipeline.models.sampling import image_ids
from pipeline.painter import FluxPainter
from pipeline.rehearsal import dry_passes, warm_up
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.text import TextEncoder
from pipeline.trace import Trace
from tests import small

# Requests of one size that differ in everything else: identity, prompt and noise by the seed.
REQUESTS = (
    {"seed": 1},
    {"weight": 0.3},
    {"guidance": 7.0},
    {"steps": 5},
    {"seed": 2, "weight": 2.0, "guidance": 1.5, "steps": 3},
)


def new_flux(modulation: str) -> IdentityFlux:
    return IdentityFlux(small.transformer(), small.cross_attentions(), modulation=modulation)


@torch.inference_mode()
def picture(
    flux: IdentityFlux,
    seed: int = 0,
    weight: float = 1.0,
    guidance: float = 4.0,
    steps: int = 2,
    grid: tuple[int, int] = (3, 4),
) -> torch.Tensor:
    """The prediction of the last step for one row with one person."""
    random = torch.Generator().manual_seed(seed)
    shapes = (grid[0] * grid[1], 64), (5, 24), (20,), (32, small.KV_DIM)
    latents, text, pooled, tokens = (torch.randn(1, *shape, generator=random) for shape in shapes)
    person = IdentityRow(0, flux.prepare(tokens), torch.full((1, 1, 1), weight))
    times, scale = torch.linspace(1, 0.1, steps), torch.tensor([guidance])
    for time, row in zip(times, flux.conditioning(times, scale, pooled), strict=True):
        velocity = flux.predict(latents, time[None], scale, text, row[None], image_ids(*grid), [person])
    return velocity


@pytest.fixture
def dynamo():
    """torch.compile as in a new process, before and after."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["regional", "whole"])
@pytest.mark.parametrize("modulation", ["live", "table"])
def test_compiled_flux_is_flux_and_is_compiled_once(dynamo, mode: str, modulation: str) -> None:
    """After the first picture nothing is compiled again, whatever a request changes but its size; no graph breaks."""
    flux, plain = new_flux(modulation), new_flux(modulation)
    compiling.compile_flux(flux, mode, backend="eager")
    picture(flux)
    graphs = dynamo["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for request in REQUESTS:
            torch.testing.assert_close(picture(flux, **request), picture(plain, **request), rtol=1e-5, atol=1e-5)
    assert dynamo["stats"]["unique_graphs"] == graphs
    assert not dynamo["graph_break"]


@pytest.mark.parametrize("modulation", ["live", "table"])
def test_regional_graphs_serve_all_blocks_and_sizes(dynamo, modulation: str) -> None:
    """Fewer graphs than blocks, and none for the third picture size."""
    flux, plain = new_flux(modulation), new_flux(modulation)
    compiling.compile_flux(flux, "regional", backend="eager")
    picture(flux)
    assert dynamo["stats"]["unique_graphs"] < 8  # blocks
    picture(flux, grid=(4, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(picture(flux, grid=(5, 4)), picture(plain, grid=(5, 4)), rtol=1e-5, atol=1e-5)


def in_another_thread(work: Callable[[], object]) -> None:
    """Where an engine steps: torch's settings of the loading thread do not reach it."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


@torch.inference_mode()
def shared_pass(flux: IdentityFlux, rows: int, people: int, text: int, grid: tuple[int, int]) -> torch.Tensor:
    """A pass whose rows differ in all that may, with people of one photo and of two in turn."""
    random = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    latents, tokens = draw(rows, grid[0] * grid[1], 64), draw(rows, text, 24)
    pooled = [flux.conditioning(torch.tensor([0.5]), torch.tensor([4.0]), draw(1, 20)) for _ in range(rows)]
    acting = [
        IdentityRow(number % rows, flux.prepare(draw(1, 32 * (1 + number), small.KV_DIM)), draw(1, 1, 1))
        for number in range(people)
    ]
    times, guidance = torch.linspace(1, 0.1, rows), torch.linspace(1, 4, rows)
    return flux.predict(latents, times, guidance, tokens, torch.cat(pooled), image_ids(*grid), acting)


USUAL = (Shape(3, 4, 128), Shape(4, 4, 128))


@pytest.mark.parametrize("modulation", ["live", "table"])
def test_after_warming_up_no_pass_of_another_thread_compiles(dynamo, modulation: str) -> None:
    """Whatever its text length, rows, people and size; so no request waits for the compiler."""
    flux, plain = new_flux(modulation), new_flux(modulation)
    compiling.compile_flux(flux, "regional", backend="eager")
    warm_up(flux, small.uncond(), dry_passes("regional", USUAL, max_rows=8))
    assert dynamo["stats"]["unique_graphs"] == 16  # what docs/settings.md says

    def draw() -> None:
        for case in product((1, 2, 3, 4), (0, 1, 2), (32, 128, 384), ((3, 4), (5, 6))):
            torch.testing.assert_close(shared_pass(flux, *case), shared_pass(plain, *case), rtol=1e-5, atol=1e-5)

    in_another_thread(draw)
    assert dynamo["stats"]["unique_graphs"] == 16
    assert not dynamo["graph_break"]


def test_what_was_not_warmed_up_compiles_in_another_thread(dynamo) -> None:
    """Also beyond torch's eight graphs of a function; a limit that only the loading thread knows would end at 19."""
    flux = new_flux("live")
    compiling.compile_flux(flux, "regional", backend="eager")
    for case in ((1, 0, 24, (3, 4)), (1, 1, 24, (3, 4)), (1, 0, 24, (4, 4)), (2, 1, 24, (3, 4))):
        shared_pass(flux, *case)
    others = (1, 1, 24, (4, 4)), (1, 1, 40, (3, 4)), (2, 2, 40, (3, 4))
    in_another_thread(lambda: [shared_pass(flux, *case) for case in others])
    assert dynamo["stats"]["unique_graphs"] == 24


def test_whole_is_warmed_up_for_usual_pictures() -> None:
    """Each size without and with a person, one by one: every further graph is minutes."""
    assert dry_passes("whole", USUAL, max_rows=8) == [(shape, 1, photos) for shape in USUAL for photos in (0, 1)]
    assert dry_passes("off", USUAL, max_rows=8) == []


def test_beyond_the_limit_of_graphs_is_drawn_without_one(dynamo) -> None:
    """No request fails because of how many sizes others have asked for."""
    flux, plain = new_flux("live"), new_flux("live")
    compiling.compile_flux(flux, "whole", backend="eager")
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for grid in ((3, 4), (4, 4), (5, 4)):
            torch.testing.assert_close(picture(flux, grid=grid), picture(plain, grid=grid), rtol=1e-5, atol=1e-5)
    assert dynamo["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(not compiling.has_compiler(), reason="inductor needs a C compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_machine_code_draws_the_same(dynamo) -> None:
    """Inductor, on this machine's device, agrees with torch's own kernels in a pass of two rows and two people."""
    flux, plain = new_flux("live"), new_flux("live")
    compiling.compile_flux(flux, "regional")
    case = (2, 2, 24, (3, 4))
    in_another_thread(
        lambda: torch.testing.assert_close(shared_pass(flux, *case), shared_pass(plain, *case), rtol=1e-4, atol=1e-4)
    )


def test_the_clock_tells_when_the_compiler_works(dynamo) -> None:
    """Never before the first graph; not again in a pass that has one."""
    flux, before = new_flux("live"), compiling.CompilerClock()
    before.listen()
    assert (before.begun, before.idle_seconds()) == (0, float("inf"))
    heard: list[float] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        heard.append(before.idle_seconds())
        return graph.forward

    compiling.compile_flux(flux, "regional", backend=backend)
    picture(flux)
    assert heard
    assert set(heard) == {0.0}
    begun = before.begun
    picture(flux, seed=1)
    assert before.begun == begun >= len(heard)
    assert 0 < before.idle_seconds() < float("inf")


def test_a_pass_that_compiled_teaches_no_curve(dynamo) -> None:
    """Its seconds are the compiler's; the next one counts."""
    flux, curves = new_flux("live"), Curves()
    compiling.compile_flux(flux, "regional", backend="eager")
    painter = FluxPainter(flux, small.vae(), small.uncond(), {}, Cache(1 << 20, lambda one: one.nbytes), curves)
    work = Work(Request(prompt="a person", seed=1, width=256, height=256, num_steps=2), 0, small.text(1), None, ())
    drawing = painter.begin(work)
    painter.advance([drawing])
    assert not curves.known
    painter.advance([drawing])
    assert curves.known


@pytest.mark.parametrize(
    ("device", "memory", "mode"), [("cuda", "lean", "regional"), ("cuda", "cast", "off"), ("cpu", "resident", "off")]
)
def test_what_is_compiled_unless_something_else_is_set(device: str, memory: str, mode: str) -> None:
    """Blocks, on a GPU, where the weights have one form; never on a CPU. What is set wins."""
    auto, whole = (Settings(acceleration={"memory": memory, "compile": name}) for name in ("auto", "whole"))
    assert acceleration.compile_mode(auto, torch.device(device)) == mode
    assert acceleration.compile_mode(whole, torch.device(device)) == "whole"


def test_compiling_leaves_the_transformer_handed_in_alone(dynamo) -> None:
    """It runs as before, without a graph."""
    transformer = small.transformer()
    flux = IdentityFlux(transformer, small.cross_attentions())
    compiling.compile_flux(flux, "regional", backend="eager")
    picture(IdentityFlux(transformer, small.cross_attentions()))
    assert not dynamo["stats"]
    picture(flux)
    assert dynamo["stats"]


def test_attention_by_another_backend_is_the_same() -> None:
    """torch's own kernel for the CPU equals the default; the autoencoder only changes how it lies in memory."""
    flux, vae = new_flux("live"), small.vae()
    chosen = Settings(acceleration={"attention": "_native_math", "vae_channels_last": True})
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    before, plain = vae.decode(latents).sample, picture(flux)
    try:
        acceleration.apply(flux, vae, chosen)
        torch.testing.assert_close(picture(flux), plain, rtol=1e-5, atol=1e-5)
    finally:
        flux.transformer.set_attention_backend("native")  # diffusers keeps the choice for the whole process too
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.decode(latents).sample, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"attention": "fast"}, "set it to one of"),
        ({"attention": "_flash_3_hub"}, "set it to one of"),
        ({"attention": "sage"}, "Set it to native"),
        ({"compile": "whole", "step_cache": 0.1}, "COMPILE to regional"),
        ({"compile": "whole", "context_parallel": 2}, "COMPILE to regional"),
        ({"compile": "regional", "memory": "nf4"}, "MEMORY to resident or lean"),
        ({"context_parallel": 2, "step_cache": 0.1}, "STEP_CACHE to 0"),
        *(
            ({"context_parallel": 2, "attention": backend}, "set ATTENTION to one of _native_cudnn, .*, native, sage")
            for backend in ("_native_math", "_native_efficient", "_flash_3", "flex", "xformers", "sage_varlen")
        ),
        ({"fp8": True, "memory": "nf4"}, "MEMORY to resident or lean"),
        ({"fp8": True}, "auto or bfloat16"),
    ],
)
def test_levers_that_cannot_be_had_say_what_to_set(values: dict[str, object], advice: str) -> None:
    """Unknown, missing and misleading attention backends, and levers that exclude each other, before files are read."""
    chosen = Settings(device="cpu", dtype="float32", weights_dir="nowhere", preset="flux-dev", acceleration=values)
    for load in (load_flux, FluxDenoiser.load):
        with pytest.raises(SettingsInvalid, match=advice):
            load(chosen)


def painted(untrained: Path, **chosen: object) -> np.ndarray:
    """The pixels of one small picture of one person, through the denoiser as the settings load it."""
    settings = Settings(device="cpu", miniature_dir=untrained, acceleration=chosen)
    random = np.random.default_rng(0)
    person = Identity(random.standard_normal((32, 96)).astype(np.float32), (), Trace({}, {}))
    text = TextEncoder.load(settings).encode("a person", 128)
    request = Request.model_validate(
        {"prompt": "a person", "seed": 1, "width": 256, "height": 256, "num_steps": 2, "people": [{"photos": ["aGk="]}]}
    )
    picture = FluxDenoiser.load(settings).denoise(request, 0, text, None, person)
    return np.asarray(Image.open(io.BytesIO(picture.data)), dtype=np.int16)


def test_the_lean_mode_and_channels_last_draw_the_same_picture(untrained: Path) -> None:
    """Lean to the bit, as nothing of the numbers changes; channels_last to a grey level, as it rounds otherwise."""
    expected = painted(untrained)
    assert np.array_equal(painted(untrained, memory="lean"), expected)
    assert np.abs(painted(untrained, vae_channels_last=True) - expected).max() <= 1
    assert not np.array_equal(painted(untrained, memory="cast"), expected)  # float8 is seen


def test_a_step_cache_has_one_row() -> None:
    """Whoever asks for more is told so, rather than given one."""
    both = {"acceleration": {"step_cache": 0.1}, "engine": {"max_rows": 2}}
    with pytest.raises(SettingsInvalid, match="MAX_ROWS"):
        acceleration.check(Settings.model_validate(both))
    acceleration.check(Settings.model_validate({"acceleration": {"step_cache": 0.1}}))
