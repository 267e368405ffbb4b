"""Held-out examples as questions: the prompt of each, the model's greedy answer, and the reference."""

from collections.abc import Sequence

import numpy as np

from lowrank.data.examples import Example
from lowrank.data.tokenizer import Tokenizer
from lowrank.generation.text import complete
from lowrank.model.decoder import Decoder


def question_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """The ids of an example up to its last response, and of that response with its end token.

    The response is the last run of trained tokens: a chat template may write something untrained after it.
    """
    end = np.flatnonzero(example.loss_mask)[-1]
    start = 1 + max(np.flatnonzero(~example.loss_mask[: end + 1]), default=-1)
    return example.ids[: start + 1].tolist(), example.ids[start + 1 : end + 2].tolist()  # the mask is over ids[1:]


def answer_examples(
    model: Decoder, variables: dict, tokenizer: Tokenizer, examples: Sequence[Example], rows: int
) -> list[tuple[str, str, str]]:
    """(prompt, answer, reference) of each example, answered greedily, `rows` side by side.

    The answer to a prompt that leaves the model no room is "".
    """
    results = []
    for start in range(0, len(examples), rows):
        part = [question_and_answer(example) for example in examples[start : start + rows]]
        fitting = [prompt for prompt, _ in part if len(prompt) < model.config.max_length]
        longest = max(len(reference) for _, reference in part)  # a longer answer cannot be equal
        texts = iter(complete(model, variables, tokenizer, fitting, longest))
        for prompt, reference in part:
            text = next(texts) if len(prompt) < model.config.max_length else ""
            results.append((tokenizer.decode(prompt), text.strip(), tokenizer.decode(reference).strip()))
    return results
