"""What tasks are reported by: accuracy, F1, Matthews' correlation, Pearson's and Spearman's."""

from __future__ import annotations

import math

import numpy as np

from mlm_dist.errors import UserError

METRICS = ("accuracy", "f1", "matthews", "pearson_spearman")


def score(metric: str, truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """The metric and what is told beside it, the metric first.

    Args:
        truth, predicted: int64 [N] classes or, for ``pearson_spearman``, float64 [N].
        classes: how many there are.
    """
    if metric == "pearson_spearman":
        pearson, spearman = correlation(truth, predicted), correlation(ranks(truth), ranks(predicted))
        error = math.sqrt(float(np.mean((truth - predicted) ** 2)))
        return {metric: (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman, "rmse": error}
    accuracy = float(np.mean(truth == predicted))
    if metric == "f1":
        return {metric: f1(truth, predicted), "accuracy": accuracy}
    if metric == "matthews":
        return {metric: matthews(truth, predicted, classes), "accuracy": accuracy}
    return {"accuracy": accuracy}


def check(metric: str, classes: int) -> None:
    """Raises UserError for a metric that so many classes do not have."""
    if classes < 2:
        raise UserError("--label-column: all labels of --train are the same; there is nothing to learn")
    if metric == "f1" and classes != 2:
        raise UserError(f"--metric f1: there are {classes} classes, and it is of two; give accuracy or matthews")


def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where nothing is of it."""
    hits = int(np.sum((truth == 1) & (predicted == 1)))
    total = int(np.sum(truth == 1) + np.sum(predicted == 1))
    return 2 * hits / total if total else 0.0


def matthews(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Matthews' correlation, for more than two classes Gorodkin's R_K (2004); 0 where either is constant."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (truth, predicted), 1)
    of_truth, of_predicted, total = table.sum(1), table.sum(0), int(table.sum())
    covariance = total * int(np.trace(table)) - int(of_truth @ of_predicted)
    spread = (total**2 - int(of_truth @ of_truth)) * (total**2 - int(of_predicted @ of_predicted))
    return covariance / math.sqrt(spread) if spread else 0.0


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where either is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs, float64 [N]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
