"""Softmax and its logarithm over the classes of one position, in float64.

A class with logit -inf is excluded: its probability is exactly 0 and its log-probability -inf.
"""

import math

import numpy as np


def logsumexp(logits: np.ndarray) -> float:
    """log sum_v exp(logits_v) of logits [V]; the largest is taken out, so nothing overflows."""
    largest = max(logits)
    return float(largest + math.log(math.fsum(math.exp(z - largest) for z in logits)))


def log_softmax(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """log softmax(logits / tau): [V] -> [V], in nats."""
    softened = np.asarray(logits, dtype=np.float64) / tau
    return softened - logsumexp(softened)


def softmax(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """softmax(logits / tau): [V] -> [V]."""
    return np.array([math.exp(logp) for logp in log_softmax(logits, tau)])


def entropy(logits: np.ndarray, tau: float = 1.0) -> float:
    """H = -sum_v prob_v log prob_v of softmax(logits / tau), in nats."""
    logp = log_softmax(logits, tau)
    return math.fsum(-math.exp(one) * one for one in logp if math.exp(one) > 0)
