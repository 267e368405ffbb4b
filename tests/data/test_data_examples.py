"""Ids and masks, literally: off by one here and a model learns the prompt, or never learns to stop."""

import json

import numpy as np
import pytest
from test_data_prompts import CHAT, CHATML, GENERATION

from lowrank.data.examples import encode_examples, encode_prompt, split
from lowrank.data.prompts import format_chat, format_prompt, segments
from lowrank.data.records import Record, read_records
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError


def records(*fields):
    return [Record(each, f"line {i}") for i, each in enumerate(fields, 1)]


def completion(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def only(examples):
    (example,) = examples.examples
    return example.ids.tolist(), example.loss_mask.tolist()


def test_the_mask_is_over_targets_and_ends_with_eos(char_tokenizer):
    examples = encode_examples(records(completion("ab", "cd")), "completion", char_tokenizer(), 8)
    assert only(examples) == ([1, 97, 98, 99, 100, 2], [False, False, True, True, True])  # targets a b [c d </s>]
    assert (examples.truncated, examples.dropped, examples.tokens, examples.trained_tokens) == (0, 0, 5, 3)
    assert examples.examples[0].ids.dtype == np.int32
    assert examples.examples[0].loss_mask.dtype == np.bool_


def test_text_and_train_on_prompt_learn_everything_after_bos(char_tokenizer):
    tokenizer = char_tokenizer()
    expected = ([1, 97, 98, 2], [True, True, True])
    assert only(encode_examples(records({"text": "ab"}), "text", tokenizer, 8)) == expected
    assert only(encode_examples(records(completion("a", "b")), "completion", tokenizer, 8, True)) == expected


def test_without_bos_an_example_begins_with_its_prompt(char_tokenizer):
    tokenizer = char_tokenizer(writes_bos=False)
    example = only(encode_examples(records(completion("ab", "c")), "completion", tokenizer, 8))
    assert example == ([97, 98, 99, 2], [False, True, True])
    assert encode_prompt("a", "completion", tokenizer) == [97]


@pytest.mark.parametrize(
    ("max_length", "ids", "mask", "truncated"),
    [
        (5, [1, 97, 98, 99, 100, 2], [False, False, True, True, True], 0),  # fits to the token
        (4, [1, 97, 98, 99, 100], [False, False, True, True], 1),  # EOS is lost, not moved: the text did not end here
        (3, [1, 97, 98, 99], [False, False, True], 1),
    ],
)
def test_truncation_cuts_the_responses_end(char_tokenizer, max_length, ids, mask, truncated):
    examples = encode_examples(records(completion("ab", "cd")), "completion", char_tokenizer(), max_length)
    assert only(examples) == (ids, mask)
    assert examples.truncated == truncated


def test_an_example_with_nothing_to_learn_is_dropped_and_counted(char_tokenizer):
    data = records(completion("abc", "d"), completion("", "e"), completion("a", ""))
    examples = encode_examples(data, "completion", char_tokenizer(), 2)
    assert [(example.index, example.ids.tolist()) for example in examples.examples] == [
        (1, [1, 101, 2]),
        (2, [1, 97, 2]),
    ]
    assert (examples.dropped, examples.truncated) == (1, 0)
    with pytest.raises(UserError, match=r"all 1 records of f.json have nothing to learn within data.max_length=2"):
        encode_examples(data[:1], "completion", char_tokenizer(), 2, path="f.json")


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_a_chat_trains_the_assistants_turns_and_has_one_bos(char_tokenizer, template):
    tokenizer = char_tokenizer(chat_template="{{ bos_token }}" + template)
    ids, mask = only(encode_examples(records({"messages": CHAT}), "chat", tokenizer, 99))
    assert ids[:2] == [1, 3] and ids.count(1) == 1
    without = char_tokenizer(chat_template=template)  # as transformers: no BOS but the template's own
    assert ids[1:] == only(encode_examples(records({"messages": CHAT}), "chat", without, 99))[0]
    learnt = [i for i, trained in zip(ids[1:], mask, strict=True) if trained]
    assert learnt == [*map(ord, "Ho"), 4, *map(ord, "No"), 4]
    assert ids[1:][mask.index(True) - 1] == 10  # "\n" of "<|im_start|>assistant\n": a model answers from here


def test_a_chat_that_gives_several_examples_is_not_split_between_training_and_evaluation(char_tokenizer):
    thinks = CHATML.replace("m.content", "('~' if loop.last and m.role == 'assistant' else '') + m.content")
    data = records({"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT})
    examples = encode_examples(data, "chat", char_tokenizer(chat_template=thinks), 99)
    assert [example.index for example in examples.examples] == [0, 0, 1, 2, 2]
    train, held_out = split(examples, 1)
    assert [[e.index for e in each.examples] for each in (train, held_out)] == [[0, 0, 1], [2, 2]]


def test_a_history_is_trained_turn_by_turn(char_tokenizer):
    fields = {"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}
    tokenizer = char_tokenizer()
    ids, mask = only(encode_examples(records(fields), "alpaca", tokenizer, 999))
    turn = "\n\n### Instruction:\n{}\n\n### Response:\n"
    expected = [1, *map(ord, "S" + turn.format("a")), ord("b"), 2, *map(ord, turn.format("c")), ord("d"), 2]
    assert ids == expected
    assert [i for i, trained in zip(ids[1:], mask, strict=True) if trained] == [ord("b"), 2, ord("d"), 2]


def test_token_ids_are_taken_as_they_are(char_tokenizer):
    data = records({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})
    assert only(encode_examples(data, "tokens", char_tokenizer(), 9)) == ([5, 6, 7], [False, True])
    with pytest.raises(UserError, match="line 1: id 999 is beyond the tokenizer's 127 tokens"):
        encode_examples(records({"input_ids": [5, 999], "labels": [5, 999]}), "tokens", char_tokenizer(), 9)


def test_a_long_text_becomes_chunks_in_which_every_target_is_trained_once(char_tokenizer):
    whole = [1, *map(ord, "abcdefg"), 2]
    examples = encode_examples(records({"text": "abcdefg"}), "text", char_tokenizer(), 3, overflow="chunk").examples
    assert [example.ids.tolist() for example in examples] == [whole[0:4], whole[3:7], whole[6:9]]
    assert [target for example in examples for target in example.ids[1:].tolist()] == whole[1:]
    with pytest.raises(UserError, match="overflow='chunk' is for texts"):
        encode_examples(records(completion("a", "b")), "completion", char_tokenizer(), 3, overflow="chunk")


def test_a_prompt_has_the_ids_its_example_begins_with(char_tokenizer):
    tokenizer = char_tokenizer(chat_template="{{ bos_token }}" + CHATML)
    ids, mask = only(encode_examples(records({"messages": CHAT[:2]}), "chat", tokenizer, 99))
    assert encode_prompt(format_chat(CHAT[:1], tokenizer), "chat", tokenizer) == ids[: 1 + mask.index(True)]
    fields = {"instruction": "Add.", "output": "3"}
    ids, mask = only(encode_examples(records(fields), "alpaca", tokenizer, 999))
    assert encode_prompt(format_prompt("alpaca", "Add."), "alpaca", tokenizer) == ids[: 1 + mask.index(True)]


def test_a_token_of_several_bytes_is_trained_whole(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    chat = {"messages": [{"role": "user", "content": "🦙"}, {"role": "assistant", "content": "🦙"}]}
    example = encode_examples(records(chat), "chat", tokenizer, 99).examples[0]
    assert example.ids[1:][example.loss_mask].tolist() == [243, 162, 169, 156, 2]  # four bytes and EOS


def test_the_mask_equals_transformers(tmp_path, char_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = char_tokenizer(chat_template="{{ bos_token }}" + GENERATION)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = only(encode_examples(records({"messages": CHAT}), "chat", tokenizer, 999))
    assert ids == expected["input_ids"]
    assert mask == [bool(trained) for trained in expected["assistant_masks"][1:]]


@pytest.mark.parametrize("folder", ["stories260k/hf", "tokenizers/llama2"])
def test_prompt_and_response_apart_have_the_ids_of_the_whole(shared_data, folder):
    tokenizer = load_tokenizer(shared_data / folder)
    data = read_records(shared_data / "alpaca" / "alpaca_9k.json", "alpaca")[:2000]
    texts = ["".join(part.text for part in segments(record.fields, "alpaca", tokenizer)[0]) for record in data]
    examples = encode_examples(data, "alpaca", tokenizer, 100_000)
    whole = [[1, *ids, 2] for ids in tokenizer.encode_batch(texts)]
    assert [example.ids.tolist() for example in examples.examples] == whole
    learnt = [tokenizer.decode(example.ids[1:][example.loss_mask], continues=True) for example in examples.examples]
    assert learnt == [record.fields["output"] for record in data]


def test_the_last_examples_are_split_off(char_tokenizer):
    examples = encode_examples(records(*({"text": t} for t in "abcd")), "text", char_tokenizer(), 8)
    train, evaluation = split(examples, 1)
    assert [example.index for example in train.examples] == [0, 1, 2]
    assert [example.index for example in evaluation.examples] == [3]
    for n in (0, 4, 9):
        with pytest.raises(UserError, match=f"data.eval_examples={n} leaves nothing"):
            split(examples, n)


def test_mistakes_are_named_before_anything_is_computed(char_tokenizer):
    tokenizer = char_tokenizer(chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(UserError, match=r"data.max_length=1 leaves no room"):
        encode_examples(records({"text": "a"}), "text", tokenizer, 1)
    with pytest.raises(UserError, match=r"f.jsonl has broken records.*line 1, line 2: .*no system$"):
        encode_examples(records({"messages": CHAT}, {"messages": CHAT}), "chat", tokenizer, 9, path="f.jsonl")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_examples(records({"text": "a"}), "text", char_tokenizer(eos_token=None), 9)


def test_a_file_becomes_examples(char_tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "Say a.", "output": "a"}]))
    examples = encode_examples(read_records(path, "alpaca"), "alpaca", char_tokenizer(), 512)
    assert char_tokenizer().decode(examples.examples[0].ids) == format_prompt("alpaca", "Say a.") + "a"
