"""The drawn world: one seed, one person; the truth that a drawing tells agrees with its pixels; prompts read back."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.miniature import heads
from pipeline.miniature.people import FIRST_HELD_OUT, KINDS, TRAITS, VECTOR_SIZE, mix, person, person_from
from pipeline.miniature.scenes import (
    BACKGROUNDS,
    CLOTHES,
    EXPRESSIONS,
    HATS,
    LIGHTS,
    MOST_TOKENS,
    STYLES,
    WORDS,
    Scene,
    held_out_scene,
    is_held_out,
    prompt,
    read,
    scene,
)
from pipeline.miniature.world import draw
from pipeline.models.alignment import ARCFACE_TEMPLATE, FFHQ_TEMPLATE, similarity

SEEDS = range(40)
ATTRIBUTES = ("background", "hat", "clothes", "expression", "light", "style")


def test_the_same_arguments_draw_the_same_pixels():
    """A drawing and its truth follow from person and scene alone."""
    one, other = (draw(person(3), scene(4)) for _ in range(2))
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__slots__)


def test_each_seed_is_a_person_of_its_own():
    """No two seeds give the same vector, nor the same picture, below and above the border of what is held out."""
    vectors = np.stack([person(seed).vector for seed in (*SEEDS, *range(FIRST_HELD_OUT, FIRST_HELD_OUT + 40))])
    assert vectors.shape == (80, VECTOR_SIZE)
    assert vectors.dtype == np.float32
    assert len(np.unique(vectors, axis=0)) == 80
    pictures = [draw(person(seed), Scene()).pixels for seed in SEEDS]
    assert len({picture.tobytes() for picture in pictures}) == len(SEEDS)


def test_any_vector_has_a_nearest_person_who_is_nearest_to_themselves():
    """Any numbers become a person with traits in range and one of each kind; doing it again changes nothing."""
    noisy = np.random.default_rng(0).normal(size=VECTOR_SIZE)
    near = person_from(noisy)
    assert np.array_equal(person_from(near.vector).vector, near.vector)
    assert np.abs(near.vector[: len(TRAITS)]).max() <= 1
    assert near.vector[len(TRAITS) :].sum() == len(KINDS)


def test_a_mixed_person_lies_between_two():
    """Half of each has the mean of their traits; a share of 0 or 1 is one of the two."""
    one, other = person(1), person(2)
    middle = mix(one, other).vector[: len(TRAITS)]
    assert middle == pytest.approx((one.vector + other.vector)[: len(TRAITS)] / 2, abs=1e-6)
    assert np.array_equal(mix(one, other, 0.0).vector, one.vector)
    assert np.array_equal(mix(one, other, 1.0).vector, other.vector)


def test_the_landmarks_lie_in_the_face_and_fit_the_templates():
    """The five points are inside the box, and where ArcFace's and FFHQ's templates want them after one similarity."""
    for seed in SEEDS:
        drawing = draw(person(seed), scene(seed))
        left, top, right, bottom = drawing.box
        assert (drawing.landmarks > (left, top)).all()
        assert (drawing.landmarks < (right, bottom)).all()
        for template in np.array(ARCFACE_TEMPLATE), np.array(FFHQ_TEMPLATE):
            matrix = similarity(drawing.landmarks, template)
            fitted = drawing.landmarks @ matrix[:, :2].T + matrix[:, 2]
            eyes = np.linalg.norm(template[1] - template[0])
            # a small round mouth is the farthest from the average one
            assert np.abs(fitted - template).max() < 0.25 * eyes


def test_hair_and_hats_lie_inside_the_picture():
    """Neither is cut by the picture's upper border, nor by the sides beside it."""
    for seed in range(60):
        labels = draw(person(seed), scene(seed), 128).labels
        upper = np.isin(labels, (heads.HAIR, heads.HAT))[: 128 // 2]
        assert not upper[0].any()
        assert not upper[:, [0, -1]].any()


def test_labels_tell_what_the_pixels_show():
    """Skin, brows, hat and clothes have their colours where their labels are."""
    bare = replace(person(0), hair_style="bald", glasses="none", beard="none", mark="none", earrings="none")
    drawing = draw(bare, Scene(hat="red beanie", clothes="green hoodie"))
    colours = {
        label: np.median(drawing.pixels[drawing.labels == label], axis=0)
        for label in (heads.SKIN, heads.LEFT_BROW, heads.HAT, heads.CLOTH)
    }
    assert np.abs(colours[heads.SKIN] - bare.skin).max() < 25
    assert np.abs(colours[heads.LEFT_BROW] - bare.hair).max() < 60
    assert colours[heads.HAT].argmax() == 0
    assert colours[heads.CLOTH].argmax() == 1


def test_labels_lie_where_the_landmarks_are():
    """Eyes and nose are labelled around their points."""
    for seed in SEEDS:
        who = replace(person(seed), glasses="none")
        drawing = draw(who, scene(seed))
        for label, point in ((heads.LEFT_EYE, 0), (heads.RIGHT_EYE, 1), (heads.NOSE, 2)):
            rows, columns = np.nonzero(drawing.labels == label)
            centre = np.array((columns.mean(), rows.mean()))
            assert np.linalg.norm(centre - drawing.landmarks[point]) < (22 if label == heads.NOSE else 4)


def test_sizes_show_the_same_drawing():
    """Half the size has the same landmarks and labels, halved."""
    who, where = person(5), scene(6)
    small, large = draw(who, where, 128), draw(who, where, 256)
    assert 2 * small.landmarks + 0.5 == pytest.approx(large.landmarks, abs=1e-3)
    assert (small.labels == large.labels[::2, ::2]).mean() > 0.95


def test_a_prompt_reads_back_as_its_scene():
    """What a prompt names is what its scene has; background and hat are always named, in few and known words."""
    for seed in range(500):
        where = scene(seed)
        text = prompt(where, seed)
        told = read(text)
        assert told == {attribute: getattr(where, attribute) for attribute in told}
        assert told["background"] == where.background
        assert told.get("hat", "none") == where.hat
        words = text.replace(",", " , ").split()
        assert len(words) <= MOST_TOKENS
        assert set(words) <= {*WORDS, ","}


def test_a_full_prompt_names_everything():
    """A full prompt of a held-out scene reads back as the whole scene."""
    for seed in range(500):
        where = held_out_scene(seed)
        text = prompt(where, seed, full=True)
        assert read(text) == {attribute: getattr(where, attribute) for attribute in ATTRIBUTES}
        words = text.replace(",", " , ").split()
        assert len(words) <= MOST_TOKENS
        assert set(words) <= {*WORDS, ","}


def test_a_prompt_of_somebody_elses_is_read_as_far_as_it_is_known():
    """Unknown words are passed over, capitals mean nothing, and no words name nothing."""
    text = "Oil painting of a happy astronaut, wearing a yellow STRAW HAT, black suit, at the beach, 8k"
    assert read(text) == {
        "expression": "smiling",
        "hat": "straw hat",
        "clothes": "black suit",
        "background": "beach",
    }
    assert read("") == {}


def test_training_never_sees_a_held_out_combination():
    """About a tenth of the combinations is held out, and every single name is both trained and held out."""
    trained = {(s.background, s.hat, s.clothes) for s in (scene(seed) for seed in range(2000))}
    held_out = {(s.background, s.hat, s.clothes) for s in (held_out_scene(seed) for seed in range(2000))}
    assert not any(is_held_out(*names) for names in trained)
    assert all(is_held_out(*names) for names in held_out)
    total = len(BACKGROUNDS) * len(HATS) * len(CLOTHES)
    assert 0.07 * total < len(held_out) < 0.13 * total
    # every single name is trained, and every background and hat is also held out with something
    for place, names in enumerate((BACKGROUNDS, HATS, CLOTHES)):
        assert {combination[place] for combination in trained} == set(names)
        assert {combination[place] for combination in held_out} == set(names)


def test_fixed_attributes_are_kept():
    """A scene has what was asked for, and is never one that is held out."""
    fixed = {"hat": "top hat", "background": "snow", "light": "dim", "scale": 1.0}
    for seed in range(20):
        where = scene(seed, **fixed)
        assert {name: getattr(where, name) for name in fixed} == fixed
        assert not where.held_out
    combination = {name: getattr(held_out_scene(0), name) for name in ("background", "hat", "clothes")}
    with pytest.raises(ValueError, match="no training combination"):
        scene(0, **combination)


@pytest.mark.parametrize(("names", "attribute"), [(EXPRESSIONS, "expression"), (LIGHTS, "light"), (STYLES, "style")])
def test_every_name_is_drawn(names, attribute):
    """Each name of an attribute comes up."""
    assert {getattr(scene(seed), attribute) for seed in range(200)} == set(names)
