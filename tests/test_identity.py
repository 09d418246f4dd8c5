import numpy as np
import pytest
import torch

from pipeline.errors import InternalError
from pipeline.identity import IdentityEncoder
from pipeline.models.eva_clip import EvaClip
from pipeline.models.face_features import normalise
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
    assert mean.shape == (32, 96)
    assert concat.shape == (96, 96)
    np.testing.assert_allclose(concat.reshape(3, 32, 96).mean(axis=0), mean, rtol=1e-5, atol=1e-6)
    one = small.faces(2)
    np.testing.assert_array_equal(encoder.encode(one, "mean").tokens, encoder.encode(one, "concat").tokens)


def test_an_identity_says_how_it_came_about(encoder):
    """Boxes, seconds and model files of the faces and of the encoder are told; the tokens are the same every time."""
    faces = small.faces(2, photos=2)
    identity = encoder.encode(faces, "concat")
    np.testing.assert_array_equal(encoder.encode(faces, "concat").tokens, identity.tokens)
    assert identity.boxes == tuple(face.box for face in faces.faces)
    assert set(identity.trace.seconds) == {"faces", "identity"}
    assert identity.trace.models == {"recogniser": "33", "pulid": "22"}


def test_the_chain_is_the_official_one(encoder):
    """Tokens are IDFormer's of raw ArcFace beside EVA-CLIP's unit vector, from the normalised features."""
    faces = small.faces(3)
    with torch.no_grad():
        pooled, hidden = encoder._eva_clip(normalise(torch.from_numpy(faces.faces[0].features)[None]))
        unit = pooled / pooled.norm(dim=-1, keepdim=True)
        condition = torch.cat((torch.from_numpy(faces.faces[0].embedding)[None], unit), dim=1)
        expected = encoder._idformer(condition, hidden)[0]
    np.testing.assert_allclose(encoder.encode(faces).tokens, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_numbers_that_are_not_finite_are_an_error(encoder):
    """NaN in a face ends here, not after a whole generation."""
    bad = small.faces(1)
    bad.faces[0].embedding[0] = np.nan
    with pytest.raises(InternalError, match="not finite"):
        encoder.encode(bad)
