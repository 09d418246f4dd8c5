import time
from dataclasses import replace

import pytest

from pipeline import flow
from pipeline.errors import IdentityNotFound
from pipeline.request import Request


class Recorder:
    """Stages that answer with what they were called with."""

    def __init__(self):
        self.stages = flow.Stages(
            faces=lambda person, index, tenant: ("faces", index, tenant),
            identity=lambda faces, fusion, tenant: ("identity", faces, fusion, tenant),
            text=lambda prompt, length: ("text", prompt, length),
            denoise=lambda request, number, *records: (request, number, *records),
        )


class Kept:
    """A store that looks at nothing."""

    def save(self, image_id, request, pictures):
        return pictures


def run(tenant="", **fields):
    return flow.chain(Request.model_validate({"prompt": "p", "seed": 1, **fields}), Recorder().stages, tenant)


def test_each_stage_gets_what_the_one_before_it_made():
    """The denoiser is handed the texts and one identity per person, in order; a person's stages know whose it is."""
    people = [{"photos": ["AAAA"]}, {"photos": ["AAAA"], "fusion": "concat"}]
    ((_, number, text, negative, *identities),) = run("t", people=people, max_sequence_length=256)
    assert number == 0
    assert text == ("text", "p", 256)
    assert negative is None
    assert identities == [("identity", ("faces", 0, "t"), "mean", "t"), ("identity", ("faces", 1, "t"), "concat", "t")]


def test_true_cfg_asks_for_the_negative_prompt():
    """Above 1 the negative prompt is encoded too."""
    ((_, _, _, negative),) = run(true_cfg=2.0, negative_prompt="n")
    assert negative == ("text", "n", 128)


def test_one_call_per_picture():
    """num_outputs pictures are drawn by as many calls, which different replicas can take."""
    assert [number for _, number, *_ in run(num_outputs=3)] == [0, 1, 2]


def test_the_denoiser_never_sees_a_photo():
    """Photos end at the face detector."""
    ((request, *_),) = run(people=[{"photos": ["AAAA"], "id_weight": 0.5}])
    assert request.people[0].photos == ()
    assert request.people[0].id_weight == 0.5


def test_an_unknown_identity_is_named():
    """A stored identity that is not there is the caller's error, with the person's index."""
    with pytest.raises(IdentityNotFound, match=r"people\[0\]"):
        run(people=[{"identity": "abc"}])


def test_a_deadline_is_stamped_once():
    """The denoiser is told when to give up, in seconds since 1970; where there is no deadline it is told nothing."""
    told = []
    stages = replace(Recorder().stages, denoise=lambda *_, **named: told.append(named))
    wanted = Request.model_validate({"prompt": "p", "seed": 1, "num_outputs": 2, "deadline_seconds": 60})
    flow.chain(wanted, stages, expires=123.0)
    flow.chain(wanted, stages)
    assert told == [{"expires": 123.0}] * 2 + [{}] * 2
    told.clear()
    before = time.time()
    flow.generate(wanted, stages, Kept())
    first, second = (named["expires"] for named in told)
    assert first == second
    assert before + 60 <= first <= time.time() + 60
