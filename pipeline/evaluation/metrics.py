"""The evaluation's arithmetic: vectors, colours and pixels in, figures with their standard errors out.

Pure functions of numpy arrays. A NaN means "could not be measured" and is left out, never counted as a value.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NOTHING = float("nan")
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value, its standard error and how many groups (people, as a rule) it comes from; NaN: not measured."""

    value: float = NOTHING
    error: float = NOTHING
    count: int = 0


def mean(values: ArrayLike, groups: ArrayLike | None = None) -> Figure:
    """The mean of values (n,) over groups, and its standard error.

    Values of one group (several pictures of one person, named by groups (n,)) are averaged first, as they are not
    independent of each other; without groups each value is its own. NaN are left out.
    """
    numbers = np.asarray(values, np.float64).reshape(-1)
    each = averaged(numbers[:, None], np.arange(len(numbers)) if groups is None else groups)[:, 0]
    each = each[np.isfinite(each)]
    if not len(each):
        return Figure()
    error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else NOTHING
    return Figure(float(each.mean()), float(error), len(each))


def averaged(rows: ArrayLike, groups: ArrayLike) -> NDArray[np.float64]:
    """Rows (n, d) -> the mean row of each group (m, d), by the groups' rising names (n,).

    Rows with a NaN are left out; a group of nothing else is NaN.
    """
    numbers, names = np.asarray(rows, np.float64), np.asarray(groups)
    known = np.isfinite(numbers).all(axis=1)
    found = np.full((len(np.unique(names)), numbers.shape[1]), NOTHING)
    for place, name in enumerate(np.unique(names)):
        mine = known & (names == name)
        if mine.any():
            found[place] = numbers[mine].mean(axis=0)
    return found


def correlation(one: ArrayLike, other: ArrayLike) -> Figure:
    """Pearson's correlation of two series (n,), with its large-sample standard error (1 - r^2) / sqrt(n - 1).

    Pairs with a NaN are left out. Fewer than three pairs, or a series that does not vary, are not measured.
    """
    pairs = np.stack((np.asarray(one, np.float64), np.asarray(other, np.float64)))  # (2, n)
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    count = pairs.shape[1]
    if count < 3 or (pairs.std(axis=1) == 0).any():
        return Figure(count=count)
    r = float(np.corrcoef(pairs[0], pairs[1])[0, 1])
    return Figure(r, (1 - r * r) / math.sqrt(count - 1), count)


def cosine(one: ArrayLike, other: ArrayLike) -> float:
    """The cosine of the angle between two vectors (d,)."""
    return float(cosines(np.asarray(one)[None], np.asarray(other)[None])[0, 0])


def cosines(one: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Cosines (n, m) between vectors (n, d) and (m, d); a vector of zeros is at right angles to every other."""
    return np.asarray(_unit(one) @ _unit(other).T, np.float64)


def _unit(vectors: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(vectors, np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0), np.float64)


def copy_paste(picture: ArrayLike, second: ArrayLike, reference: ArrayLike, least: float = 1e-6) -> float:
    """How much nearer a picture is to the reference photo than to another photo of the same person.

    (theta_gt - theta_gr) / max(theta_tr, least), with theta the angles between the embeddings (d,) of the picture (g),
    the second photo (t, the truth) and the reference (r): 1 is a copy of the reference, 0 is as near to both, -1 a copy
    of the second photo. Source: the copy-paste metric of MultiID-Bench (WithAnyone, arXiv 2510.14975).
    """
    gt, gr, tr = (
        math.acos(min(1.0, max(-1.0, cosine(one, other))))
        for one, other in ((picture, second), (picture, reference), (second, reference))
    )
    return (gt - gr) / max(tr, least)


def luminance(colours: ArrayLike) -> NDArray[np.float64]:
    """Colours (..., 3), RGB -> their luminance (...), by the weights of Rec. 601."""
    return np.asarray(np.asarray(colours, np.float64) @ np.array(LUMA), np.float64)


def psnr(one: ArrayLike, other: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of 8-bit values; infinite where they are equal."""
    error = float(np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def distances(picture: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Mean squared differences (n,) between a picture (...) and others (n, ...), over all pixels and colours."""
    many = np.asarray(others, np.float32)
    squares: NDArray[np.float32] = (many - np.asarray(picture, np.float32)) ** 2
    return np.asarray(squares.reshape(len(many), -1).mean(axis=1), np.float64)
