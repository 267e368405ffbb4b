"""What a model reads: the words of a prompt, and which turns of a chat it learns."""

import pytest

from lowrank.data.chat import DEFAULT_TEMPLATE, Segment, format_chat
from lowrank.data.prompts import format_prompt
from lowrank.data.prompts import segments as examples_of
from lowrank.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No"},
]
CHATML_SEGMENTS = [
    Segment("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
    Segment("Ho<|im_end|>", True),
    Segment("\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", False),
    Segment("No<|im_end|>", True),
    Segment("\n", False),
]


def segments(fields, format, tokenizer):
    """Those of a record that becomes one example."""
    (parts,) = examples_of(fields, format, tokenizer)
    return parts


def test_the_alpaca_prompt_word_for_word():
    assert format_prompt("alpaca", "Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert format_prompt("alpaca", "Add.", "1 {2}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n"
    )


@pytest.mark.parametrize("input", [None, "", "1 2"])
def test_an_alpaca_record_begins_with_the_prompt_for_generation(char_tokenizer, input):
    fields = {"instruction": "Add.", "input": input, "output": "3"}
    prompt = format_prompt("alpaca", "Add.", input or "")
    assert segments(fields, "alpaca", char_tokenizer()) == [Segment(prompt, False), Segment("3", True, ends=True)]


def test_completion_and_text_are_taken_as_they_are(char_tokenizer):
    tokenizer = char_tokenizer()
    fields = {"prompt": "a ", "completion": "b"}
    assert segments(fields, "completion", tokenizer) == [Segment("a ", False), Segment("b", True)]
    assert segments({"text": " a\n"}, "text", tokenizer) == [Segment(" a\n", True)]
    assert format_prompt("completion", "a ") == format_prompt("text", "a ") == "a "


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_the_assistants_turns_and_their_end_tokens_are_trained(char_tokenizer, template):
    tokenizer = char_tokenizer(chat_template=template)
    assert segments({"messages": CHAT}, "chat", tokenizer) == CHATML_SEGMENTS


@pytest.mark.parametrize("template", [CHATML, GENERATION, None])
def test_a_chat_begins_with_the_prompt_for_generation(char_tokenizer, template):
    tokenizer = char_tokenizer(chat_template=template)
    text = "".join(part.text for part in segments({"messages": CHAT}, "chat", tokenizer))
    for turns in (1, 3):
        assert text.startswith(format_chat(CHAT[:turns], tokenizer))
    assert format_prompt("chat", "Hi", tokenizer=tokenizer) == format_chat(CHAT[:1], tokenizer)


def test_the_default_template(char_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    assert segments({"messages": [system, *CHAT[:2]]}, "chat", char_tokenizer()) == [
        Segment("### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n", False),
        Segment("Ho</s>", True),
        Segment("\n\n", False),
    ]


def test_an_end_token_left_outside_the_generation_tag_is_trained(char_tokenizer):
    template = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = char_tokenizer(chat_template=template, eos_token="<|im_end|>")
    assert segments({"messages": CHAT}, "chat", tokenizer) == CHATML_SEGMENTS


@pytest.mark.parametrize("tag", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_template_without_end_tokens_gets_eos_at_its_end(char_tokenizer, tag):
    template = "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}{% else %} A:"
    template += tag[0] + "{{ m.content }}" + tag[1] + "{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %} A:{% endif %}"
    parts = segments({"messages": CHAT[:2]}, "chat", char_tokenizer(chat_template=template))
    assert parts[0] == Segment("Q:Hi A:", False)
    assert "".join(part.text for part in parts[1:] if part.trained) == "Ho</s>"
    assert parts[-1].trained


def test_a_chat_without_an_answer_has_nothing_to_learn(char_tokenizer):
    for template in (CHATML, GENERATION):
        parts = segments({"messages": CHAT[:1]}, "chat", char_tokenizer(chat_template=template))
        assert [part for part in parts if part.trained] == []


def test_an_empty_answer_repeats_nothing(char_tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    parts = segments({"messages": chat}, "chat", char_tokenizer(chat_template=template))
    assert "".join(part.text for part in parts) == "<|im_start|>Hi<|im_start|></s>"
    assert parts[-1] == Segment("</s>", True)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(char_tokenizer):
    # As Qwen 3's own: an empty thought stands before the last answer only.
    thinks = CHATML.replace(
        "m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"
    )
    tokenizer = char_tokenizer(chat_template=thinks)
    assert examples_of({"messages": CHAT}, "chat", tokenizer) == [
        [
            Segment(format_chat(CHAT[:i], tokenizer), False),
            Segment(f"<think></think>{CHAT[i]['content']}<|im_end|>", True),
            Segment("\n", False),
        ]
        for i in (1, 3)
    ]


def test_an_answer_follows_the_prompt_of_generation_although_the_template_cuts_thoughts(char_tokenizer):
    # As DeepSeek-R1's: the prompt begins a thought, and no answer is rendered with its own.
    cuts = CHATML.replace("m.content", "m.content.split('</think>')[-1]").replace(
        "assistant\n' }}", "assistant\n<think>\n' }}"
    )
    tokenizer = char_tokenizer(chat_template=cuts)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo"}
    for answer, trained in ((thought, "hm\n</think>\n\nHo<|im_end|>"), (CHAT[1], "Ho<|im_end|>")):
        parts = segments({"messages": [CHAT[0], answer]}, "chat", tokenizer)
        assert parts[:2] == [Segment(format_chat(CHAT[:1], tokenizer), False), Segment(trained, True)]
        assert parts[0].text.endswith("assistant\n<think>\n")


def test_what_hugging_face_gives_a_template(char_tokenizer):
    template = (
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ {'a': '<é>'} | tojson }}"
        "{% if tools is not none %}tools{% endif %}"
        "{% for m in messages %}{% if m.content == 'More' %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    text = format_chat(CHAT, char_tokenizer(chat_template=template))
    assert text == '<s>26 Jul 2024{"a": "<é>"}HiHo'  # a fixed day: a run resumed tomorrow sees the same examples


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
        ("{{ messages[0].content + none }}", "does not take these messages"),
        ("{{ messages.append(1) }}", "does not take these messages: access to attribute 'append'"),
        ("{% for m in messages %}", "cannot be read"),
    ],
)
def test_a_template_that_fails_says_why_in_one_line(char_tokenizer, template, message):
    with pytest.raises(UserError, match=message) as error:
        format_chat(CHAT, char_tokenizer(chat_template=template))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [CHATML, GENERATION, DEFAULT_TEMPLATE])
def test_rendering_equals_transformers(char_tokenizer, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    tokenizer = char_tokenizer(chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "".join(part.text for part in segments({"messages": CHAT}, "chat", tokenizer))
    assert text == theirs.apply_chat_template(CHAT, tokenize=False)
    prompt = theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert format_chat(CHAT[:1], tokenizer) == prompt
