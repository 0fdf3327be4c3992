"""Multinomial logistic regression on features, with an L2 penalty."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from trainer.samples import EvaluationError

ROWS = 65_536
"""Rows of features per matrix product; limits the memory for logits."""


def hold_out(labels: Tensor, seed: int) -> Tensor:
    """A mask (bool) of a tenth of each class: at least one sample of a class that has two or more."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels.cpu() == label.cpu()).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held[members[: max(1, len(members) // 10) if len(members) > 1 else 0]] = True
    return held.to(labels.device)


def fit(features: Tensor, labels: Tensor, classes: int, l2: float, max_iterations: int = 1000) -> tuple[Tensor, Tensor]:
    """Finds weights (classes, dim) and biases (classes,) that minimise Σ cross-entropy + l2/2 · ‖weights‖².

    Equals scikit-learn's LogisticRegression with C = 1/l2: the same L-BFGS with the same tolerance. Computes on the
    device of the features and in their precision. Raises EvaluationError if the fit does not converge to numbers.
    """
    count, dim = features.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(classes, dim + 1).to(features)
        loss = torch.zeros((), dtype=torch.float64)
        gradient = torch.zeros(classes, dim + 1, dtype=torch.float64)
        for x, y in zip(features.split(ROWS), labels.split(ROWS)):
            log_p = (x @ weights[:, :-1].T + weights[:, -1]).log_softmax(dim=1)
            rows = torch.arange(len(y), device=y.device)
            loss -= log_p[rows, y].double().sum().cpu()
            error = log_p.exp_()
            error[rows, y] -= 1
            gradient[:, :-1] += (error.T @ x).double().cpu()
            gradient[:, -1] += error.double().sum(dim=0).cpu()
        penalised = torch.from_numpy(flat).view(classes, dim + 1)[:, :-1]
        gradient[:, :-1] += l2 * penalised
        loss += l2 / 2 * penalised.square().sum()
        return loss.item() / count, gradient.div_(count).view(-1).numpy()

    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations + 100, "gtol": 1e-4, "ftol": 64 * 2.0**-52}
    found = minimize(objective, np.zeros(classes * (dim + 1)), jac=True, method="L-BFGS-B", options=options).x
    if not np.isfinite(found).all():
        raise EvaluationError("the fit of the classifier does not converge to numbers: the features are too large")
    weights = torch.from_numpy(found).view(classes, dim + 1).to(features)
    return weights[:, :-1], weights[:, -1]


def predict(features: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """The likeliest classes of each row, likeliest first: int64 (N, 5), or fewer columns if there are fewer classes."""
    return torch.cat([(x @ weights.T + biases).topk(min(5, len(weights))).indices for x in features.split(ROWS)])
