"""How held-out examples are asked and compared."""

import numpy as np
import pytest

from lowrank.data.examples import Example, encode_examples
from lowrank.data.records import Record
from lowrank.data.tokenizer import load_tokenizer
from lowrank.generation.answers import question_and_answer


def example(trained: str) -> Example:
    """`trained`: a mark for every target, x where it is trained."""
    mask = np.array([mark == "x" for mark in trained])
    return Example(np.arange(len(mask) + 1), mask, 0)


@pytest.mark.parametrize(
    ("trained", "question", "answer"),
    [
        ("..xxx", [0, 1, 2], [3, 4, 5]),
        ("..xx.", [0, 1, 2], [3, 4]),  # something untrained behind it, as chat templates write
        (".xx..x.", [0, 1, 2, 3, 4, 5], [6]),  # the last of two turns
        ("xxx", [0], [1, 2, 3]),
    ],
)
def test_the_answer_is_the_last_run_of_trained_tokens(trained, question, answer):
    assert question_and_answer(example(trained)) == (question, answer)


def test_a_chat_is_asked_its_last_question(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "And you?"), ("assistant", "Fine.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (chat,) = encode_examples([Record({"messages": messages}, "line 1")], "chat", tokenizer, 200).examples
    question, answer = question_and_answer(chat)
    assert tokenizer.decode(answer).strip() == "Fine."
    assert answer[-1] == tokenizer.eos_id
    assert tokenizer.decode(question).rstrip().endswith("### Assistant:")
    assert "Fine" not in tokenizer.decode(question)
