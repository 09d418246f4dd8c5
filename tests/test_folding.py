import pytest
import torch

from pipeline.caches import Cache
from pipeline.models import folding
from pipeline.models.pulid import PulidCrossAttention
from tests import small
from tests.parity.rule import fill


@pytest.fixture(scope="module")
def module() -> PulidCrossAttention:
    """A cross-attention whose norms have gains and offsets, at an eighth of the official width."""
    made = fill(PulidCrossAttention(dim=384, dim_head=32, heads=4, kv_dim=256), "pulid_ca.0.").requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for norm in (made.norm1, made.norm2):
        norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=random))
        norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=random))
    return made


def inputs(photos=1):
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, 32 * photos, 256, generator=random)
    return tokens, 3 * torch.randn(2, 50, 384, generator=random) + 0.5


def far(ours, theirs) -> float:
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("photos", [1, 2, 8])
def test_a_prepared_attention_is_the_module(module, photos):
    """Folded or by its keys and values, it gives what the module gives, to 1e-5 in float32."""
    tokens, image = inputs(photos)
    expected = module(tokens, image).double()
    for prepared in (folding.fold(module, tokens), folding.keep(module, tokens)):
        assert far(prepared(image), expected) < 1e-5


def test_bfloat16_folded_is_as_exact_as_the_module(module):
    """Against float64, a fold rounded to bfloat16 errs no more than the module in bfloat16 does."""
    tokens, image = (x.bfloat16() for x in inputs())
    exact = PulidCrossAttention(dim=384, dim_head=32, heads=4, kv_dim=256).double()
    exact.load_state_dict(module.state_dict())
    half = PulidCrossAttention(dim=384, dim_head=32, heads=4, kv_dim=256).bfloat16()
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = exact(tokens.double(), image.double())
        folded = far(folding.fold(half, tokens)(image), expected)
        assert folded < 1.5 * far(half(tokens, image), expected)


def test_what_costs_less_is_chosen():
    """At FLUX.1's sizes up to four concatenated photos are folded; of more the keys and values are kept."""
    with torch.device("meta"):
        official = PulidCrossAttention()
    assert [folding.folds(official, 32 * photos) for photos in range(1, 9)] == [True] * 4 + [False] * 4


def test_the_bytes_of_an_identity():
    """A folded photo takes 126 MB in bfloat16 at FLUX.1's sizes, as 20 pairs of matrices of 3072 x 512."""
    with torch.device("meta"):
        modules = [PulidCrossAttention().bfloat16() for _ in range(20)]
        prepared = folding.prepare(modules, torch.empty(1, 32, 2048, dtype=torch.bfloat16))
    assert prepared.nbytes == 20 * (2 * 3072 * 512 + 512) * 2 == 125_849_600
    kinds = {type(layer) for layer in folding.prepare(small.cross_attentions(), torch.zeros(1, 320, 32)).layers}
    assert kinds == {folding.CachedAttention}


def test_kept_keys_and_values_leave_the_cross_attention_in_host_memory():
    """Only what a step reads is copied to the device, here meta, and counted; beside shared weights nothing is."""
    (here, *_), photos = small.cross_attentions(), 3
    tokens = torch.zeros(1, 32 * photos, small.KV_DIM)
    there = folding.prepare([here], tokens.to("meta")).layers[0]
    assert {parameter.device.type for parameter in here.parameters()} == {"cpu"}
    assert {part.device.type for part in (there.key, there.gain, there.to_q, there.to_out)} == {"meta"}
    keys_values, read = 2 * 32 * photos * 48 * 4, (2 * 32 + 2 * 32 * 48) * 4
    assert there.nbytes == keys_values + read
    assert folding.keep(here, tokens).nbytes == keys_values


def test_what_costs_less_takes_less_of_a_small_card():
    """Where the cross-attention lies in host memory, the choice of the cheaper form is that of the smaller one."""
    official = PulidCrossAttention().bfloat16()
    for photos in range(1, 9):
        tokens = torch.empty(1, 32 * photos, 2048, dtype=torch.bfloat16, device="meta")
        folded, kept = folding.fold(official, tokens).nbytes, folding.keep(official, tokens).nbytes
        assert (folded < kept) == folding.folds(official, 32 * photos)


def test_folded_identities_are_bounded_in_bytes(module):
    """The least recently used make room; one that is there is not folded again."""
    folds = []

    def fold(seed):
        def compute():
            folds.append(seed)
            return folding.prepare([module], torch.randn(1, 32, 256, generator=torch.Generator().manual_seed(seed)))

        return cache.get_or_compute(("", bytes([seed])), compute)

    size = folding.prepare([module], inputs()[0]).nbytes
    cache = Cache(int(2.5 * size), lambda identity: identity.nbytes)
    for seed in (1, 2, 1, 3, 1, 2):
        fold(seed)
    assert folds == [1, 2, 3, 2]
