"""Continuations of prompts of tokens, from a completions endpoint.

The endpoint receives and returns token ids, so that no template or tokenizer of the server takes
part. vLLM takes defaults from the model's generation config, so each request states them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continuation(
    model: str,
    prompt: Sequence[int],
    *,
    most: int,
    ends: Sequence[int],
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    **extra: Any,
) -> dict[str, Any]:
    """Make the request for a continuation.

    Args:
        model: Name of the model on the server.
        prompt: Token ids of the prompt.
        most: Maximum number of new tokens.
        ends: Token ids that end the continuation.
        temperature: Sampling temperature; 0 is greedy.
        seed: Sampling seed.
        top_p: Nucleus sampling threshold; 1 means all tokens.
        **extra: Further fields that only vLLM has.

    Returns:
        The arguments of the client's ``completions.create``.
    """
    exact = {"return_token_ids": True, "stop_token_ids": list(ends)}
    exact |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": most,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "extra_body": exact | extra,
    }


def tokens_of(completion: Any) -> tuple[list[int] | None, int]:
    """Read the new tokens of a completion.

    Args:
        completion: The response of the endpoint.

    Returns:
        The token ids with the end token, or None if the server does not return them; and their
        number.
    """
    tokens = getattr(completion.choices[0], "token_ids", None)
    if tokens is None:
        return None, int(completion.usage.completion_tokens)
    return [int(token) for token in tokens], len(tokens)
