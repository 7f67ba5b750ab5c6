"""A formula for one position, applied to every position of a batch."""

from collections.abc import Callable

import numpy as np


def per_position(formula: Callable[..., float], *arrays: np.ndarray) -> np.ndarray:
    """formula(a[b, t], ...) at each row b and position t: [B, T, ...] each -> [B, T].

    Logits [B, T, V] hand the formula a vector [V], labels [B, T] a single number. The formula
    may return a vector, such as a cotangent [V]; the result is then [B, T, V].
    """
    rows, positions = arrays[0].shape[:2]
    return np.array(
        [
            [formula(*(array[b, t] for array in arrays)) for t in range(positions)]
            for b in range(rows)
        ]
    )
