import numpy as np
import pytest

from pipeline.errors import InternalError
from pipeline.identity import IdentityEncoder
from pipeline.models.eva_clip import EvaClip
from pipeline.models.pulid import IDFormer
from pipeline.models.sizes import MINIATURE
from tests import small
from tests.parity.rule import fill


@pytest.fixture(scope="module")
def encoder() -> IdentityEncoder:
    eva_clip = fill(EvaClip(**MINIATURE.eva_clip), "visual.").eval()
    idformer = fill(IDFormer(**MINIATURE.idformer), "pulid_encoder.").eval()
    return IdentityEncoder(eva_clip, idformer, {"pulid": "22"})


def test_fusion(encoder):
    """Mean averages the photos' tokens, concat puts them side by side; one photo is the same in both."""
    faces = small.faces(1, photos=3)
    mean, concat = encoder.encode(faces, "mean").tokens, encoder.encode(faces, "concat").tokens
    assert mean.shape == (32, 64)
    assert concat.shape == (96, 64)
    np.testing.assert_allclose(concat.reshape(3, 32, 64).mean(axis=0), mean, rtol=1e-5, atol=1e-6)
    one = small.faces(2)
    np.testing.assert_array_equal(encoder.encode(one, "mean").tokens, encoder.encode(one, "concat").tokens)


def test_people_in_one_batch_are_themselves(encoder):
    """Encoded together or alone, each person's tokens and boxes are their own."""
    people = [(small.faces(1), "mean"), (small.faces(2, photos=2), "concat")]
    for (faces, fusion), together in zip(people, encoder.encode_batch(people), strict=True):
        alone = encoder.encode(faces, fusion)
        np.testing.assert_allclose(together.tokens, alone.tokens, rtol=1e-4, atol=1e-5)
        assert together.boxes == tuple(face.box for face in faces.faces)
        assert set(together.trace.seconds) == {"faces", "identity"}
        assert together.trace.models == {"recogniser": "33", "pulid": "22"}


def test_one_bad_face_fails_alone(encoder):
    """Numbers that are not finite put an error in their own slot; the neighbour is served."""
    bad = small.faces(1)
    bad.faces[0].embedding[0] = np.nan
    good, failed = encoder.encode_batch([(small.faces(2), "mean"), (bad, "mean")])
    assert np.isfinite(good.tokens).all()
    assert isinstance(failed, InternalError)
