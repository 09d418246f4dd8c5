"""The miniature's recognisers and its parser: their losses by hand, their files, and what they reach."""

import math

import numpy as np
import pytest
import torch

from pipeline.miniature.people import FIRST_HELD_OUT, VECTOR_SIZE
from pipeline.models.detection import PARSER_CLASSES, build_bisenet
from pipeline.training.miniature import parser, recogniser
from pipeline.training.miniature.crops import disturbed, nudged, people_crops
from pipeline.training.miniature.recogniser_networks import FAMILIES, build, write_onnx
from pipeline.weights import SHIPPED


@pytest.fixture
def crop():
    return np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recogniser_is_read_as_arcface(family, crop, tmp_path):
    """insightface's class reads the file, scales pixels itself, and says what the torch network says."""
    torch.manual_seed(0)
    network = build(family).train()
    network(torch.randn(8, 3, 112, 112))  # batch norms that do something
    for weight in network.parameters():
        weight.data = weight.data.half().float()  # as the file stores them
    write_onnx(network, tmp_path / "recogniser.onnx")
    read = recogniser.production_recogniser(tmp_path / "recogniser.onnx")
    with torch.no_grad():
        expected = network.eval()(recogniser.as_input(crop[None]))[0]
    np.testing.assert_allclose(read.embed(crop), expected.numpy(), atol=1e-5)


def test_the_recognisers_are_small_and_not_alike():
    """Each has at most 1.2 million parameters, and none has another's layers."""
    networks = [build(family) for family in FAMILIES]
    assert all(sum(weight.numel() for weight in network.parameters()) <= 1_200_000 for network in networks)
    shapes = {tuple(tuple(weight.shape) for weight in network.parameters()) for network in networks}
    assert len(shapes) == len(FAMILIES)


def test_cosface_by_hand():
    """Two people, centres at right angles, an embedding of length 3 between them: worked out with the margin."""
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = recogniser.cosface_loss(torch.tensor([[2.4, 1.8]]), centres, torch.tensor([0]))  # cosines 0.8 and 0.6
    own, other = 24 * (0.8 - 0.3), 24 * 0.6
    assert loss.item() == pytest.approx(math.log(math.exp(own) + math.exp(other)) - own, abs=1e-5)


def test_centres_are_directions_around_nought():
    """Every person's centre has unit length, and no direction is everybody's."""
    torch.manual_seed(0)
    centres = recogniser.Centres()(torch.randn(400, VECTOR_SIZE))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(400))
    assert centres.mean(dim=0).norm() < 0.1


def test_recognition_figures_by_hand():
    """Two people, two drawings each, in the plane: cosines and nearest drawings can be counted."""
    angles = np.radians([[0, 60], [90, 150]])  # the second drawing of the first person is nearer to the other's first
    found = recogniser.recognition_figures(np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
    different = np.cos(np.radians([90, 150, 30, 90]))
    assert found["same"] == pytest.approx(0.5)
    assert found["different"] == pytest.approx(different.mean(), abs=1e-6)
    assert found["top1"] == 0.5


def test_hard_pixels_by_hand():
    """Of 32 pixels 3 are unsure: their mean counts. Where all are sure, the two hardest (a sixteenth) do."""

    def loss_at(*doubts):
        right = torch.full((32,), 0.99)
        right[: len(doubts)] = 1 - torch.tensor(doubts)
        scores = torch.stack([right, 1 - right]).log().reshape(1, 2, 4, 8)
        return parser.hard_pixel_loss(scores, torch.zeros(1, 4, 8, dtype=torch.long)).item()

    assert loss_at(0.5, 0.6, 0.4) == pytest.approx(-np.log([0.5, 0.4, 0.6]).mean(), abs=1e-5)
    assert loss_at(0.1, 0.2) == pytest.approx(-np.log([0.9, 0.8]).mean(), abs=1e-5)


def test_parsing_loss_counts_all_three_outputs():
    """The main output and both auxiliary ones, equally."""
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    outputs = [torch.zeros(1, PARSER_CLASSES, 4, 4)] * 3  # all labels equally likely
    assert parser.parsing_loss(outputs, labels).item() == pytest.approx(3 * math.log(PARSER_CLASSES), abs=1e-4)


def test_a_loss_at_every_fourth_pixel_sees_what_the_network_says_there():
    """Scores before they are enlarged, enlarged to a quarter, give the loss of the whole output at those pixels."""
    torch.manual_seed(0)
    network, pixels = build_bisenet(16).eval(), torch.randn(1, 3, 64, 64)
    labels = torch.randint(0, PARSER_CLASSES, (1, 64, 64))
    with torch.no_grad():
        quick, whole = parser.outputs(network, pixels), network(pixels)
    assert parser.parsing_loss(quick, labels).item() == pytest.approx(parser.parsing_loss(whole, labels).item(), 1e-3)


def test_label_figures_by_hand():
    """Four pixels, one wrong (hair seen as hat, which is whitened): three of four, and unions per label."""
    found = parser.label_figures(np.array([0, 1, 17, 18], np.uint8), np.array([0, 1, 17, 17], np.uint8))
    assert found == {"accuracy": 0.75, "mean_iou": pytest.approx((1 + 1 + 0.5) / 3), "whitening": 0.75}


def test_a_slim_parser_has_the_official_names():
    """Width 64 is facexlib's network itself; width 16 has its layers by name, none wider than a quarter."""
    from facexlib.parsing.bisenet import BiSeNet

    official = BiSeNet(num_class=PARSER_CLASSES).state_dict()
    shapes = {name: weight.shape for name, weight in build_bisenet().state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in official.items()}
    slim = build_bisenet(16).state_dict()
    assert list(slim) == list(official)
    fixed = {1, 3, 7, PARSER_CLASSES}  # kernels, colours, labels
    for name, weight in slim.items():
        assert all(
            n == o if o in fixed else 4 * n == o for n, o in zip(weight.shape, official[name].shape, strict=True)
        )


def test_quick_training_writes_whole_files(tmp_path):
    """A few steps of everything: files that production reads, finite figures, and a second call that trains nothing."""
    plan = recogniser.RecogniserPlan(people=8, drawings=2, steps=2, batch=4, held_out=3)
    figures = recogniser.train(tmp_path, tmp_path / "weights", plan)
    figures |= parser.train(tmp_path, tmp_path / "weights", parser.ParserPlan(1, batch=2, held_out=2))
    assert all(math.isfinite(value) for value in figures.values())
    assert {"conditioning_same", "judge_different", "training_top1", "parser_whitening"} <= set(figures)
    written = (tmp_path / "weights" / "judge" / "recogniser.onnx").stat().st_mtime_ns
    assert recogniser.train(tmp_path, tmp_path / "weights", plan).items() <= figures.items()
    assert (tmp_path / "weights" / "judge" / "recogniser.onnx").stat().st_mtime_ns == written


def test_the_identity_loss_reaches_the_picture(tmp_path, crop):
    """The training recogniser equals its ONNX file, its weights are frozen, and gradients pass through it."""
    role = next(role for role in recogniser.ROLES if role.name == "training")
    plan = recogniser.RecogniserPlan(people=4, drawings=1, steps=1, batch=4, held_out=2)
    recogniser.train_role(role, tmp_path, tmp_path / "recogniser_training.onnx", plan)
    network = recogniser.load_training_recogniser(tmp_path)
    picture = recogniser.as_input(crop[None]).requires_grad_()
    embedding = network(picture)
    read = recogniser.production_recogniser(tmp_path / "recogniser_training.onnx").embed(crop)
    assert torch.cosine_similarity(torch.from_numpy(read), embedding[0].detach(), dim=0) > 0.9999  # stored as halves
    embedding.sum().backward()
    assert picture.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("change", [disturbed, nudged])
def test_a_disturbed_crop_is_still_the_crop(change):
    """Augmentation keeps shape and kind, differs from draw to draw, is the same for a seed, and moves pixels little."""
    crop = people_crops(FIRST_HELD_OUT, 1, 1, exact=True)[0, 0]
    one, other = (change(crop, np.random.default_rng(seed)) for seed in (1, 2))
    assert one.shape == crop.shape
    assert one.dtype == np.uint8
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, change(crop, np.random.default_rng(1)))
    assert np.abs(one.astype(float) - crop).mean() < 32


@pytest.mark.parametrize("name", ["antelopev2/arcface_miniature.onnx", "judge/recogniser.onnx"])
def test_shipped_recognisers_know_people_they_have_not_seen(name):
    """Twenty held-out people: drawings of one are alike, of two are not, soft pictures included."""
    found = recogniser.held_out_figures(SHIPPED / name, 20)
    assert found["same"] >= 0.85
    assert found["same_p10"] >= 0.7
    assert abs(found["different"]) <= 0.06
    assert found["top1"] >= 0.95
    assert found["soft_same"] >= 0.8
    assert 15 <= found["length"] <= 30


def test_the_shipped_parser_tells_the_face_from_the_rest():
    """Twenty held-out people: nearly all pixels are rightly kept or whitened, in a file of a few megabytes."""
    path = SHIPPED / parser.FILE
    assert path.stat().st_size <= 4_000_000
    found = parser.held_out_figures(path, 20)
    assert found["whitening"] >= 0.97
    assert found["accuracy"] >= 0.95
