"""The gradient signal-to-noise ratio of a layer's stream, from mini-batch gradients."""

import math

import numpy as np


def gsnr(gradients: np.ndarray) -> float:
    """max(sum_j (mean_j^2 - s_j^2 / M), 0) / sum_j s_j^2 over parameters j; gradients [M, P].

    M >= 2 mini-batches at the same parameters; s^2 is the unbiased variance. The mean's square
    holds s^2 / M of noise, which is taken off. The sum is unbiased, unlike a sum of clamped
    summands: of pure noise those give (E max(Z^2 - 1, 0) = 0.484) / M. Constant gradients give
    inf; gradients that are all 0 have neither signal nor noise and give NaN.
    """
    batches, parameters = gradients.shape
    signal = noise = 0.0
    for j in range(parameters):
        variance = float(np.var(gradients[:, j], ddof=1))
        signal += float(gradients[:, j].mean()) ** 2 - variance / batches
        noise += variance
    if noise > 0:
        return max(signal, 0.0) / noise
    return math.inf if signal > 0 else math.nan
