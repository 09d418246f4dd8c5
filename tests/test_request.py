"""What may be asked for."""

import json
import math

import pytest
from pydantic import ValidationError

from pipeline.request import MAX_SEED, NEGATIVE_PROMPT, Mask, Person, Photo, Request

PHOTO = "AAAA"


def parse(**fields):
    """As the HTTP layer does it: JSON in, Request out."""
    return Request.model_validate(json.loads(json.dumps({"prompt": "a portrait", **fields})))


def refusal(**fields):
    with pytest.raises(ValidationError) as raised:
        parse(**fields)
    return raised.value


def person(**fields):
    return {"people": [{"photos": [PHOTO], **fields}]}


def test_defaults_are_those_of_the_official_app():
    """A prompt alone is a request; ranges and defaults are app_flux.py's (pulid.md 2.13)."""
    request = parse(**person())
    assert (request.width, request.height, request.num_steps, request.guidance_scale) == (896, 1152, 28, 4.0)
    assert (request.true_cfg, request.timestep_to_start_cfg, request.max_sequence_length) == (1.0, 1, 128)
    assert (request.people[0].id_weight, request.people[0].start_step, request.seed) == (1.0, 0, None)
    assert request.negative_prompt == NEGATIVE_PROMPT
    assert parse().people == ()


BOUNDS = {
    "width": (256, 1536, 240, 1552),
    "height": (256, 1536, 240, 1552),
    "num_steps": (1, 30, 0, 31),
    "guidance_scale": (1, 10, 0.99, 10.01),
    "true_cfg": (1, 10, 0.99, 10.01),
    "timestep_to_start_cfg": (0, 20, -1, 21),
    "num_outputs": (1, 4, 0, 5),
    "output_quality": (1, 100, 0, 101),
    "seed": (0, MAX_SEED, -1, MAX_SEED + 1),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_ranges(name):
    """Both ends of every range are in it; what lies beyond is refused, naming the field."""
    low, high, below, above = BOUNDS[name]
    for value in (low, high):
        assert getattr(parse(**{name: value}), name) == value
    for value in (below, above, 10**30, -(10**30), 10**400):
        assert refusal(**{name: value}).errors()[0]["loc"][0] == name


@pytest.mark.parametrize("name", ["width", "height"])
@pytest.mark.parametrize("value", [0, 255, 257, 260, 1000, 100_000])
def test_sizes_go_in_steps_of_16(name, value):
    """A size that is odd, too small, too large or not a multiple of 16 is refused."""
    refusal(**{name: value})


PERSON_BOUNDS = {
    "id_weight": (0, 3, -1, 100),
    "start_step": (0, 10, -1, 11),
    "end_step": (1, 30, 0, 31),
    "face": (0, 10**6, -1, -2),
}


@pytest.mark.parametrize("name", PERSON_BOUNDS)
def test_ranges_of_a_person(name):
    """A person's numbers have ranges too."""
    low, high, below, above = PERSON_BOUNDS[name]
    for value in (low, high):
        assert getattr(parse(**person(**{name: value})).people[0], name) == value
    for value in (below, above):
        assert refusal(**person(**{name: value})).errors()[0]["loc"][:3] == ("people", 0, name)


FLOATS = ["guidance_scale", "true_cfg"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_nan_and_no_infinities(value):
    """Numbers are finite, everywhere."""
    for name in FLOATS:
        refusal(**{name: value})
    refusal(**person(id_weight=value))
    refusal(**person(mask={"box": [value, 0, 1, 1]}))
    refusal(**person(mask={"box": [0, 0, 1, value]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_steps": "28"},
        {"num_steps": True},
        {"num_steps": 28.5},
        {"num_steps": 28.0},
        {"num_steps": None},
        {"guidance_scale": "4"},
        {"guidance_scale": False},
        {"guidance_scale": [4]},
        {"seed": 1.0},
        {"seed": 1.5},
        {"seed": "7"},
        {"seed": True},
        {"width": "896"},
        {"max_sequence_length": 100},
        {"max_sequence_length": "128"},
        {"output_format": "svg"},
        {"output_format": "PNG"},
        {"output_format": None},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": ["a"]},
        {"negative_prompt": None},
        {"people": {}},
        {"people": "AAAA"},
        {"people": None},
        {"people": [5]},
        person(face="nose"),
        person(face=True),
        person(face=1.0),
        person(face="0"),
        person(fusion="max"),
        person(id_weight=True),
        person(id_weight="1"),
        person(photos=PHOTO),
        person(photos=[5]),
        person(photos=[None]),
        person(photos=[{}]),
        person(photos=[{"base64": PHOTO, "url": "https://photos.example/a"}]),
        person(photos=[{"base64": None}]),
        person(photos=[{"url": "https://photos.example/" + "a" * 2048}]),
        person(photos=[]),
        person(photos=None),
        person(identity="x"),
        person(photos=[], identity="x" * 65),
        person(photos=[], identity=5),
        person(mask={}),
        person(mask="AAAA"),
        person(mask={"base64": PHOTO, "box": [0, 0, 1, 1]}),
        person(mask={"url": "https://photos.example/a"}),
        person(mask={"base64": "A" * 8_000_001}),
    ],
)
def test_types_are_strict(fields):
    """No text for a number, no truth value for one, no whole float for an integer, exactly one source of a picture."""
    refusal(**fields)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"steps": 5}, ("steps",)),
        ({"lora": "../x"}, ("lora",)),
        ({"Prompt": "x"}, ("Prompt",)),
        (person(strength=1), ("people", 0, "strength")),
        (person(photos=[{"base64": PHOTO, "path": "/etc/passwd"}]), ("people", 0, "photos", 0, "path")),
        (person(mask={"box": [0, 0, 1, 1], "blur": 3}), ("people", 0, "mask", "blur")),
    ],
)
def test_unknown_fields_are_refused(fields, place):
    """A misspelt field is an error that names it, at every depth."""
    error = refusal(**fields).errors()[0]
    assert (error["type"], error["loc"]) == ("extra_forbidden", place)


@pytest.mark.parametrize(
    "box",
    [
        [0.5, 0, 0.5, 1],
        [0, 0.5, 1, 0.5],
        [0.6, 0, 0.5, 1],
        [0, 0.6, 1, 0.5],
        [-0.1, 0, 1, 1],
        [0, 0, 1.1, 1],
        [0, 0, 1],
        [0, 0, 1, 1, 1],
        [0, 0, "1", 1],
        [0, 0, True, 1],
        [],
        "0,0,1,1",
    ],
)
def test_boxes(box):
    """A box has four fractions and an inside."""
    refusal(**person(mask={"box": box}))


def test_good_masks():
    """A box as a JSON list, or a picture."""
    assert parse(**person(mask={"box": [0, 0.25, 0.5, 1]})).people[0].mask.box == (0, 0.25, 0.5, 1)
    assert parse(**person(mask={"base64": PHOTO})).people[0].mask.base64 == PHOTO


def test_how_many():
    """At most four people with at most eight photos each; a person has photos or a stored identity."""
    assert len(parse(people=[{"photos": [PHOTO] * 8}] * 4).people) == 4
    refusal(people=[{"photos": [PHOTO]}] * 5)
    refusal(people=[{"photos": [PHOTO] * 9}])
    refusal(people=[{}])
    assert parse(people=[{"identity": "x"}]).people[0].photos == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"people": [5] * 100_000},
        person(photos=[5] * 100_000),
        person(mask={"box": ["x"] * 100_000}),
        {str(number): 1 for number in range(100_000)},
        person(**{str(number): 1 for number in range(100_000)}),
    ],
)
def test_a_flood_of_mistakes_is_one_error(fields):
    """What is wrong a hundred thousand times is not listed as often: every entry would cost memory."""
    assert refusal(**fields).error_count() <= 5


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("https://photos.example/a.jpg", "url"),
        ("HTTPS://photos.example/a.jpg", "url"),
        ("s3://bucket/key", "url"),
        ("file:///etc/passwd", "url"),
        ("data:image/png;base64,AAAA", "base64"),
        ("DATA:image/png;base64,AAAA", "base64"),
        ("/9j/4AAQSkZJRgABAQ", "base64"),
        ("", "base64"),
    ],
)
def test_a_photo_as_a_plain_string(text, field):
    """An address is known by its scheme; all else is base64."""
    photo = parse(people=[{"photos": [text]}]).people[0].photos[0]
    assert getattr(photo, field) == text


def test_steps_fit_together():
    """A person acts in at least one step that is taken."""
    refusal(num_steps=4, **person(start_step=4))
    refusal(**person(start_step=5, end_step=5))
    refusal(**person(start_step=5, end_step=4))
    assert parse(num_steps=4, **person(start_step=3, end_step=4)).people[0].start_step == 3


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u00a0\u3000", "\u200d\u200c"])
def test_an_empty_prompt(prompt):
    """A prompt says something; a negative prompt need not."""
    refusal(prompt=prompt)
    assert parse(negative_prompt=prompt).negative_prompt == prompt


# zero-width, direction, soft hyphen, blank letters, a tag
HIDDEN = "\u200b\u200e\u202a\u202e\u2060\u2066\u2069\ufeff\u00ad\u061c\u180e\ufff9\u115f\u3164\U000e0041"


@pytest.mark.parametrize("character", [*"\x00\x07\x1b\x7f\x85", *HIDDEN])
def test_invisible_characters(character):
    """NUL, controls, zero-width and direction marks are refused in both prompts, with their position."""
    for name in ("prompt", "negative_prompt"):
        error = refusal(**{name: f"a{character}b"})
        assert error.errors()[0]["loc"] == (name,)
        assert "position 1" in str(error)


@pytest.mark.parametrize(
    "prompt", ["Ein Gruß\nan Zoë", "人物写真", "صورة", "👩\u200d🚀", "\u0600\u0661", "می\u200cخواهم", "a\tb\r\n"]
)
def test_every_script_is_welcome(prompt):
    """Any script, emoji with joiners, line ends and tabs are text."""
    assert parse(prompt=prompt).prompt == prompt


def test_lone_surrogates():
    """Half a character, which no encoder can write, is refused in text; in a photo, photos.py refuses it."""
    for text in ("\ud800", "a\udfffb"):
        refusal(prompt=text)
        refusal(negative_prompt=text)
        refusal(**person(photos=[], identity=text))
        refusal(**person(mask={"base64": text}))


def test_long_prompts():
    """8192 characters are the most, in any script."""
    assert len(parse(prompt="é" * 8192).prompt) == 8192
    refusal(prompt="é" * 8193)
    refusal(prompt="a" * 1_000_000)
    refusal(negative_prompt="a" * 8193)


SECRET = "tell-nobody"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": f"{SECRET}\x00"},
        {"prompt": SECRET, "num_steps": 0, "seed": -1},
        {"prompt": SECRET * 1000},
        {"negative_prompt": f"{SECRET}\u200b"},
        {"prompt": [SECRET]},
        {"prompt": SECRET, "people": [{"photos": [SECRET], "identity": "x"}]},
        {"people": [{"photos": [SECRET], "start_step": 5, "end_step": 4}]},
        {"people": [{"photos": [{"base64": SECRET, "url": SECRET}]}]},
        {"people": [{"photos": [{"base64": SECRET, "more": 1}]}]},
        {"people": [{"photos": [[SECRET]]}]},
        {"people": [{"photos": [SECRET], "mask": {"base64": SECRET, "box": [0, 0, 1, 1]}}]},
        {"people": [{"photos": [{"url": "https://photos.example/" + SECRET * 1000}]}]},
    ],
)
def test_errors_never_show_what_was_sent(fields):
    """Neither prompt nor photo is in an error's text."""
    error = refusal(**fields)
    assert SECRET not in str(error)
    assert SECRET not in json.dumps(error.errors(include_input=False, include_url=False, include_context=False))


def test_records_do_not_show_their_secrets():
    """Nor are they in the repr, which ends up in logs."""
    photo = [{"base64": SECRET}, {"url": f"https://photos.example/{SECRET}"}]
    request = parse(prompt=SECRET, negative_prompt=SECRET, people=[{"photos": photo, "mask": {"base64": SECRET}}])
    assert SECRET not in repr(request)
    assert SECRET not in str(request)


def test_records_do_not_change():
    """A request, a person, a photo and a mask are frozen."""
    request = parse(**person(mask={"box": [0, 0, 1, 1]}))
    one = request.people[0]
    for record, name in ((request, "prompt"), (one, "id_weight"), (one.photos[0], "base64"), (one.mask, "box")):
        with pytest.raises(ValidationError):
            setattr(record, name, None)


def test_a_request_survives_its_own_json():
    """What was asked for can be written down and read again."""
    request = parse(seed=MAX_SEED, **person(face=1, end_step=3, mask={"box": [0, 0, 0.5, 1]}))
    assert Request.model_validate(json.loads(request.model_dump_json())) == request
    assert Request.model_validate_json(request.model_dump_json()) == request


def test_a_seed_is_drawn_once():
    """A given seed stays, 0 too; a drawn one is exact in every JSON client."""
    assert parse(seed=0).with_seed().seed == 0
    seeds = {parse().with_seed().seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_without_photos():
    """What goes on to the denoiser has the people, but none of their photos."""
    request = parse(people=[{"photos": [SECRET, f"https://photos.example/{SECRET}"], "id_weight": 2.0}])
    bare = request.without_photos()
    assert SECRET not in bare.model_dump_json()
    assert (bare.people[0].id_weight, bare.prompt) == (2.0, request.prompt)
    assert len(request.people[0].photos) == 2


@pytest.mark.parametrize(("true_cfg", "used"), [(1.0, False), (1.009, False), (1.02, True), (10, True)])
def test_when_a_second_pass_runs(true_cfg, used):
    """The official app's threshold: more than a hundredth from 1."""
    assert parse(true_cfg=true_cfg).uses_true_cfg is used


def test_python_callers_may_use_records():
    """Records nest as they are, not only as JSON."""
    one = Person(photos=(Photo(base64=PHOTO),), mask=Mask(box=(0, 0, 1, 1)))
    assert Request(prompt="a", people=(one,)).people == (one,)
