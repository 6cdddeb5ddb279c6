"""How the codes of a codebook are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax.types import Metric


def code_usage(size: int) -> Metric:
    """Perplexity and used share of a codebook from tokens.   exp(-sum_k p_k log p_k),   |{k: p_k > 0}| / K

    The perplexity is the number of codes that would be used as much if they were used evenly. Batches are integer arrays of
    any shape.
    Args: size: K, codes in the book.
    Returns: a metric; `code_perplexity` in [1, K] and `codes_used` in (0, 1].
    Raises: ValueError: no codes; at a batch, tokens that are no integers in 0..K-1.

    Example:
        >>> from diffjax import metrics
        >>> metrics.score(code_usage(4), np.array([[0, 1], [1, 0]]))
        {'code_perplexity': 2.0, 'codes_used': 0.5}

    Reference: van den Oord et al. 2017, arXiv:1711.00937.
    """
    if size < 1:
        raise ValueError(f"size must be at least one code; got {size}")

    def update(state: np.ndarray, tokens: Any) -> np.ndarray:
        tokens = np.asarray(tokens)
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(f"tokens must be integers in 0..{size - 1}; got {tokens.dtype} {tokens.shape}")
        return state + np.bincount(tokens.reshape(-1), minlength=size)

    def compute(state: np.ndarray) -> dict[str, float]:
        if not state.sum():
            raise ValueError("tokens: got none; give at least one batch")
        p = state[state > 0] / state.sum()
        return {"code_perplexity": float(np.exp(-(p * np.log(p)).sum())), "codes_used": len(p) / size}

    return Metric(lambda: np.zeros(size, np.int64), update, lambda a, b: a + b, compute)
