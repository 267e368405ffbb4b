"""TODO inference.answers"""

import numpy as np

from lowrank.data import examples
from lowrank.data.tokenizer import Tokenizer
from lowrank.inference.text import complete
from lowrank.model.decoder import Decoder


def question_and_answer(example: examples.Example) -> tuple[list[int], list[int]]:
    """The ids of an example up to its last response, and of that response with what ends it.

    That is the last run of trained tokens: a chat template may write something untrained behind it.
    """
    trained = np.flatnonzero(example.loss_mask)
    end = trained[-1]
    before = np.flatnonzero(~example.loss_mask[: end + 1])
    start = before[-1] + 1 if len(before) else 0
    return example.ids[: start + 1].tolist(), example.ids[start + 1 : end + 2].tolist()  # the mask is over ids[1:]


def answers(
    model: Decoder, variables: dict, tokenizer: Tokenizer, asked_of: list[examples.Example], rows: int
) -> list[tuple[str, str, str]]:
    """(prompt, answer, reference) of each example, answered greedily, `rows` side by side.

    A prompt that leaves the model no room to answer has the answer "".
    """
    given = []
    pairs = [question_and_answer(example) for example in asked_of]
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        asked = [prompt for prompt, _ in part if len(prompt) < model.config.max_length]
        longest = max(len(reference) for _, reference in part)  # a longer answer cannot be equal
        texts = iter(complete(model, variables, tokenizer, asked, longest))
        for prompt, reference in part:
            text = next(texts) if len(prompt) < model.config.max_length else ""
            given.append((tokenizer.decode(prompt), text.strip(), tokenizer.decode(reference).strip()))
    return given
