"""How well scores rank what was chosen: AUC, also by user, and its improvement. Exact, in NumPy."""

import numpy as np
from numpy.typing import ArrayLike


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Share of the pairs of a positive and a negative in which the positive scores higher.

    Ties count one half. Labels [n] are 0 or 1; NaN when all are alike.

    Raises:
      ValueError: other labels, a score that is NaN, or unequal lengths.
    """
    labels, scores = _checked(labels, scores)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, size = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    ranks = (last - (size - 1) / 2)[place]  # from 1; the mean among equals
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> float:
    """sum_u n_u AUC_u / sum_u n_u, n_u the samples of user u (Zhou et al. 2018, eq. 8).

    Users [n] whose labels are all alike have no AUC and are left out; NaN when none is left. With
    one positive and one negative for each user it is the share of users ranked right.
    """
    labels, scores = _checked(labels, scores)
    users = np.asarray(users)
    if users.shape != labels.shape:
        raise ValueError(f"users: shape {users.shape} with {len(labels)} labels; need one each")
    order = np.argsort(users, kind="stable")
    ends = np.flatnonzero(np.diff(users[order])) + 1
    total, weight = 0.0, 0
    for rows in np.split(order, ends):
        own = auc(labels[rows], scores[rows])
        if not np.isnan(own):
            total, weight = total + len(rows) * own, weight + len(rows)
    return total / weight if weight else float("nan")


def relative_improvement(value: float, base: float) -> float:
    """RelaImpr = (AUC - 0.5) / (AUC_base - 0.5) - 1: over chance, as a share of the base's.

    Raises:
      ValueError: the base is at chance.
    """
    if base == 0.5:
        raise ValueError(f"base: {base}; need an AUC other than chance")
    return (value - 0.5) / (base - 0.5) - 1


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """bool and float [n]."""
    labels, scores = np.asarray(labels).reshape(-1), np.asarray(scores).reshape(-1)
    if labels.shape != scores.shape:
        raise ValueError(f"scores: {len(scores)} for {len(labels)} labels; need one each")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels: need 0 and 1 only")
    if np.isnan(scores).any():
        raise ValueError("scores: NaN cannot be ranked")
    return labels.astype(bool), scores
