"""Closed-form repair of a linear layer that loses some of its inputs: what stays makes up for what goes.

CORP (2026): after a cut, the removed activations are predicted from the kept ones by ridge regression on unlabelled
images, and the prediction is folded into the layer that reads them. With y = W_K x_K + W_R x_R + b and the fit
x_R ~ A^T x_K + c, the repaired layer is W_K + W_R A^T with bias b + W_R c. Nothing else changes, and no gradient is
needed. Where we differ: the published method also mends the logits of attention, for which we have no repair; the
regression here is of the outputs of MLP units and of heads, with an intercept where the layer has a bias.

Notation: n rows of activations, U inputs of the layer, O outputs, K kept and R removed inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Sums over rows of activations: all that least squares among them need. total (U,), products (U, U), float64."""

    def __init__(self, inputs: int) -> None:
        self.rows = 0
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x: (n, U)."""
        self.rows += len(x)
        self.total += x.sum(0).double().cpu()
        self.products += (x.T @ x).double().cpu()


@dataclass(frozen=True)
class Repaired:
    """weight (O, K) and bias (O,), None where the layer had none. without, left: mean squared error of the layer's
    outputs on the rows of the moments, without the repair and with it.
    """

    weight: Tensor
    bias: Tensor | None
    without: float
    left: float


def ridge(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor, strength: float) -> Repaired:
    """The layer on its kept inputs alone, repaired.

    Args:
        weight: (O, U); bias: (O,) or None, then the fit has no intercept. kept: (K,) ascending.
        strength: of the ridge, as a fraction of the mean variance of the kept inputs; above 0.
    The error that is left never exceeds the error without: with A = (C + s)^-1 C_KR the residual's covariance is
    C_RR - C_RK (C + s)^-1 (C + 2 s) (C + s)^-1 C_KR.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool)
    removed[kept] = False
    second = moments.products / moments.rows
    mean = moments.total / moments.rows if bias is not None else torch.zeros_like(moments.total)
    centred = second - mean[:, None] * mean
    within, across = centred[kept][:, kept], centred[kept][:, removed]
    ridged = within + torch.eye(len(kept), dtype=torch.float64) * (strength * within.diagonal().mean()).clamp_min(
        1e-300
    )
    fit = torch.linalg.solve(ridged, across)  # (K, R)
    wide = weight.double()
    lost = wide[:, removed]
    residual = centred[removed][:, removed] - fit.T @ across - across.T @ fit + fit.T @ within @ fit
    new_bias = None if bias is None else (bias.double() + lost @ (mean[removed] - fit.T @ mean[kept])).to(bias.dtype)
    return Repaired(
        (wide[:, kept] + lost @ fit.T).to(weight.dtype),
        new_bias,
        _error(lost, second[removed][:, removed]),
        _error(lost, residual),
    )


def _error(weight: Tensor, second: Tensor) -> float:
    """Mean over the outputs of E[(W x)^2], given E[x x^T]; rounding may make what is 0 a little less."""
    return max(0.0, float((weight @ second * weight).sum() / len(weight)))
