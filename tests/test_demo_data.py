"""The demo's generated world: deterministic, disjoint, its tokenizer exact, and every answer found in its story.

The solver below shares nothing with the generator but the English: it reads a record's input and answers from that.
"""

import importlib.util
import json
import pathlib
import re

import pytest

sentencepiece = pytest.importorskip("sentencepiece")

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "demo"

FACTS = {  # the question, and the sentence that answers it
    r"What is (\w+)\?": r"{} is a (\w+)",
    r"Where does (\w+) live\?": r"{} lives in the (\w+)",
    r"What does (\w+) like\?": r"{} likes (\w+)",
    r"Which hat does (\w+) wear\?": r"{} wears a (\w+) hat",
    r"What does (\w+) carry\?": r"{} carries (\w+ \w+)",
}
READ = "Read the story and answer the question."


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(script):
    """What the script makes by default, but for the number of texts."""
    return script.make(count=1500)


def committed(name: str) -> list[dict[str, str]]:
    return json.loads((FOLDER / name).read_text())


def sentences(story: str) -> list[str]:
    """The facts; the first sentence only says who is there."""
    return story.rstrip(".").split(". ")[1:]


def solve(instruction: str, text: str) -> str:
    """The right answer."""
    if words := re.fullmatch(r"The words are (.*)\.", text):
        words = words[1].split(", ")
        return {
            "Say the words backwards.": f"Backwards they are {', '.join(words[::-1])}.",
            "Name the first word.": f"The first word is {words[0]}.",
            "Name the last word.": f"The last word is {words[-1]}.",
        }[instruction]
    assert instruction == READ
    story, question = text.split("\n")
    (pattern,) = (says.format(m[1]) for asks, says in FACTS.items() if (m := re.fullmatch(asks, question)))
    (answer,) = (sentence for sentence in sentences(story) if re.fullmatch(pattern, sentence))
    return f"{answer}."


def test_same_seed_same_bytes_and_another_seed_another_world(script):
    small = {"count": 300, "heldout": 5, "train": 60, "evaluation": 5}
    first, again, other = (script.make(seed=seed, **small) for seed in (7, 7, 8))
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("name", ["instructions.json", "instructions_eval.json"])
def test_committed_instructions_are_what_the_script_makes(files, name):
    assert (FOLDER / name).read_bytes() == files[name]


@pytest.mark.parametrize(("name", "count"), [("instructions.json", 3000), ("instructions_eval.json", 200)])
def test_every_answer_follows_from_its_input(name, count):
    records = committed(name)
    assert len(records) == count
    for record in records:
        assert record["output"] == solve(record["instruction"], record["input"])


def test_a_question_needs_the_right_animal():
    """No fact is told twice, no value belongs to two animals, and in half of the stories another animal has a rival fact."""
    rivals, asked = 0, 0
    for record in committed("instructions_eval.json"):
        if record["instruction"] != READ:
            continue
        told = sentences(record["input"].split("\n")[0])
        assert len(set(told)) == len(told)
        values = [sentence.split(" ", 1)[1] for sentence in told]
        assert len(set(values)) == len(values)
        verb = record["output"].split()[1]
        asked += 1
        rivals += sum(sentence.split()[1] == verb for sentence in told) > 1
    assert asked > 100
    assert rivals / asked > 0.4


def world_of(text: str) -> set:
    """The story (its set of facts) or the lists that a text or an input is about; a song is about nothing."""
    if text.startswith("The words are"):
        return set(re.findall(r"The words are ([^.]*)\.", text))
    if " sang " in text:
        return set()
    facts = set()
    for sentence in re.split(r"(?<=[.?]) ", text.split("\n")[0])[1:]:
        sentence = sentence.rstrip(".")
        name = sentence.split()[0]
        if sentence in facts or not any(re.fullmatch(says.format(name), sentence) for says in FACTS.values()):
            break  # the facts are told again from here on
        facts.add(sentence)
    return {frozenset(facts)}


def test_no_story_and_no_list_occurs_twice(files):
    """Neither between training and evaluation, nor between the instructions and the text the base is pretrained on."""
    train, evaluation = ([r["input"] for r in committed(f"instructions{part}.json")] for part in ("", "_eval"))
    pretrain, heldout = (
        [json.loads(line)["text"] for line in files[name].splitlines()] for name in ("pretrain.jsonl", "heldout.jsonl")
    )
    seen = [set().union(*map(world_of, texts)) for texts in (train, evaluation, heldout, pretrain)]
    assert (len(seen[0]), len(seen[1])) == (3000, 200)
    for i, earlier in enumerate(seen):
        for later in seen[i + 1 :]:
            assert not earlier & later
    assert not set(heldout) & set(pretrain)


def test_pretraining_text_never_shows_the_instruction_format(files):
    text = (files["pretrain.jsonl"] + files["heldout.jsonl"]).decode()
    for mark in ("###", "Instruction", "Response", "Below is", "Read the"):
        assert mark not in text


def test_the_tokenizer_is_exact_and_one_word_is_one_token(files):
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    assert tokenizer.vocab_size() == 1024
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    texts = [json.loads(line)["text"] for line in files["heldout.jsonl"].splitlines()]
    odd = [
        "",
        "a",
        " two  spaces ",
        "tab\tand\r\nlines\n\n\nmore\n",
        "naïve 日本語 🦊 1234",
        "<s> </s> <unk>",
        'don\'t "quote"',
    ]
    for text in texts + odd:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.unk_id() not in tokenizer.encode(text)
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    assert len(words) > 200
    assert [word for word in sorted(words) if len(tokenizer.encode(word)) > 1] == []


def test_lengths_fit_the_small_base(script, files):
    """Texts and prompts stay far below the base's 512 positions, and the prompt's fixed part is a word a token."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    prompts = [script.ALPACA.format(**record) for record in committed("instructions_eval.json")]
    assert max(len(tokenizer.encode(prompt)) for prompt in prompts) < 160
    assert max(len(tokenizer.encode(json.loads(line)["text"])) for line in files["pretrain.jsonl"].splitlines()) < 320


def test_files_are_small(files):
    assert sum(len(files[name]) for name in ("instructions.json", "instructions_eval.json")) < 1_500_000
