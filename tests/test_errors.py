import pickle

import pytest

from pipeline import errors


def tree(root=errors.PipelineError):
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    """An error crosses process borders with its type and its one message."""
    copy = pickle.loads(pickle.dumps(kind("what to do")))
    assert type(copy) is kind
    assert str(copy) == "what to do"


def test_the_tree_in_the_docstring_is_the_tree():
    """Each leaf stands in the module's docstring with its status and code."""
    for kind in tree():
        assert kind.__name__ in errors.__doc__
        if not kind.__subclasses__():
            line = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line)
            assert line.split()[-2:] == [str(kind.status), kind.code]


def test_codes_are_unique():
    """A program can tell every leaf by its code."""
    codes = [kind.code for kind in tree() if kind is not errors.PipelineError and not kind.__subclasses__()]
    assert len(codes) == len(set(codes))
    assert all(400 <= kind.status < 500 for kind in tree(errors.BadInput))
