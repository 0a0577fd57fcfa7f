"""Whole answers: many requests run together until all are done."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsv2_jax.engine import Engine, Output
from dsv2_jax.model import Decoder
from dsv2_jax.sampling import Sampling
from pallas_kernels.latent_pages import PAGE


class Completion(NamedTuple):
    """A whole answer."""

    token_ids: list[int]  # new tokens only; an EOS or stop token is among them
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str  # "stop": EOS, a stop token, or the caller; "length": max_new_tokens or the end of the context


def complete(
    engine: Engine,
    requests: Sequence[tuple[Sequence[int], Sampling]],
    on_output: Callable[[int, Output], bool] = lambda index, output: False,
) -> list[list[Completion]]:
    """Runs requests, each a prompt and what it asks, and returns the answers of each.

    Args:
        on_output: called with (index of the request, output) for every new token; True stops that answer after it.
    """
    numbers = {engine.add_request(*request, name=f"request {i}"): i for i, request in enumerate(requests)}
    done = [[Completion([], [], [], "") for _ in range(sampling.n)] for _, sampling in requests]
    while engine.busy:
        for output in engine.step():
            index = numbers[output.request]
            answer = done[index][output.answer]
            if answer.finish_reason:
                continue
            answer.token_ids.append(output.token)
            answer.logprobs.append(output.logprob)
            answer.top_logprobs.append(output.top)
            reason = output.finish_reason
            if on_output(index, output):
                engine.abort(output.request, output.answer)
                reason = "stop"
            done[index][output.answer] = answer._replace(finish_reason=reason or "")
    return done


def greedy(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt, `max_new_tokens` long whatever EOS says."""
    sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
    tokens = sum(-(-(len(prompt) + max_new_tokens) // PAGE) * PAGE for prompt in prompts)
    engine = Engine(model, cache_tokens=tokens, max_batch=len(prompts))
    return [answers[0].token_ids for answers in complete(engine, [(prompt, sampling) for prompt in prompts])]
