"""What the window's attention says about a layer and about each of its entries.

Shapes: H query heads, K key/value heads, G = H/K, W window queries, N entries, P = N − W prefix
entries, D head_dim.
"""

import math

import torch
from torch import Tensor

from kvdock.kernels.window_scores import window_probabilities
from kvdock.policy import AttentionParams

LARGEST_LOG = 600.0
"""Keeps preferences and their reciprocals finite in float64."""


def window_statistics(
    queries: Tensor, keys: Tensor, params: AttentionParams, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return every prefix entry's indicator and the layer's dispersion and shift.

    With A the window's probabilities on the prefix, not renormalised:
    indicator[k, j] = mean_g (mean_r A + γ·var_r A), before pooling;
    dispersion = −Σ A·log A, shift = Σ var_r A. (The authors' log(A + 1e-10) differs
    by less than float32 resolves.)

    Args:
        queries: the last W queries, [1, H, W, D].
        keys: all keys, [1, K, N, D].

    Returns:
        float32 [1, K, P] and float32 [2].
    """
    window = queries.shape[2]
    prefix = keys.shape[2] - window
    indicators, dispersions, shifts = [], [], []
    for _, block in window_probabilities(queries, keys, params):
        part = block[..., :prefix]
        # E[a²] − E[a]² would cancel; one query has no variance
        variance, mean = torch.var_mean(part, dim=3, correction=min(1, window - 1))
        indicators.append(mean.add_(variance, alpha=gamma).mean(dim=2))
        shifts.append(variance.sum())
        dispersions.append(torch.special.entr(part).sum())
        del block, part  # before the next block is made
    layer = torch.stack([torch.stack(dispersions).sum(), torch.stack(shifts).sum()])
    return torch.cat(indicators, dim=1), layer


def preference(statistics: Tensor, tau1: float, tau2: float) -> float:
    """Return dispersion^(1/τ1) · shift^(1/τ2), the one thing of a layer the host reads.

    Args:
        statistics: dispersion and shift, [2], sums over all the model's heads.
    """
    logs = [math.log(x) if x > 0 else -math.inf for x in statistics.tolist()]
    exponent = logs[0] / tau1 + logs[1] / tau2
    # Constant attention shifts nothing and has no logarithm; layers that all do so share evenly.
    return math.exp(max(-LARGEST_LOG, min(exponent, LARGEST_LOG)))
