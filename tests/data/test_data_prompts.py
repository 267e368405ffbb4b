"""What a model reads: the words of a prompt, and which turns of a chat it learns."""

import re

import pytest

from lowrank.data.chat import DEFAULT_TEMPLATE, Segment, _takes_parts, end_ids, format_chat
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


@pytest.mark.parametrize("template", [CHATML, GENERATION])
@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_a_turn_that_says_so_is_not_trained(char_tokenizer, template, off):
    messages = [CHAT[0], CHAT[1] | off, *CHAT[2:]]
    parts = segments({"messages": messages}, "chat", char_tokenizer(chat_template=template))
    assert [part.text for part in parts if part.trained] == ["No<|im_end|>"]
    assert "".join(part.text for part in parts) == "".join(part.text for part in CHATML_SEGMENTS)


def test_tools_are_shown_or_refused_by_name(char_tokenizer):
    tools = [{"type": "function", "function": {"name": "get_x"}}]
    shows = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    parts = segments({"messages": CHAT[:2], "tools": tools}, "chat", char_tokenizer(chat_template=shows))
    assert parts[0].text.startswith('[{"type": "function", "function": {"name": "get_x"}}]<|im_start|>user')
    call = {"type": "function", "function": {"name": "get_x", "arguments": {}}}
    calls = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(UserError, match=r"does not show 'tools', 'messages\[1\].tool_calls'; remove them"):
        segments({"messages": calls, "tools": tools}, "chat", char_tokenizer(chat_template=CHATML))


def test_thoughts_are_read_under_any_name_or_refused(char_tokenizer):
    thinks = CHATML.replace("m.content", "('(' + m.thinking + ')' if m.thinking and loop.last else '') + m.content")
    messages = [CHAT[0], CHAT[1] | {"reasoning_content": "hm"}, CHAT[2], CHAT[3] | {"reasoning": "hem"}]
    examples = examples_of({"messages": messages}, "chat", char_tokenizer(chat_template=thinks))
    trained = [[part.text for part in parts if part.trained] for parts in examples]
    assert trained == [["(hm)Ho<|im_end|>"], ["(hem)No<|im_end|>"]]
    with pytest.raises(
        UserError, match=r"not show 'messages\[1\].reasoning_content', 'messages\[3\].reasoning'; remove"
    ):
        segments({"messages": messages}, "chat", char_tokenizer(chat_template=CHATML))


def test_a_system_message_is_shown_or_refused(char_tokenizer):
    messages = [{"role": "system", "content": "Sys"}, *CHAT[:2]]
    drops = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(UserError, match=r"does not show 'messages\[0\]' of the role system"):
        segments({"messages": messages}, "chat", char_tokenizer(chat_template=drops))
    # As Mistral's: it stands before the last question, so in a prompt and never before an answer.
    prompts = drops.replace(
        "m.content", "(messages[0].content + '|' if loop.last and m.role == 'user' else '') + m.content"
    )
    parts = segments({"messages": messages}, "chat", char_tokenizer(chat_template=prompts))
    assert parts[0].text == "<|im_start|>user\nSys|Hi<|im_end|>\n<|im_start|>assistant\n"


def test_where_nothing_else_ends_a_turn_the_start_of_the_next_does(char_tokenizer):
    # As GLM 4's.
    starts = (
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
    )
    starts += "{% if add_generation_prompt %}<|im_end|>{% endif %}"
    tokenizer = char_tokenizer(chat_template=starts)
    parts = segments({"messages": CHAT}, "chat", tokenizer)
    assert "".join(part.text for part in parts if part.trained) == "Ho<|im_start|>No<|im_start|>"
    assert end_ids(tokenizer) == {2, 3}


def test_a_header_that_only_a_conversation_has_is_not_trained(char_tokenizer):
    # As Gemma 4's after a tool's answer.
    template = CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1].role != 'tool'")
    messages = [*CHAT[:2], {"role": "tool", "content": "42"}, CHAT[3]]
    parts = segments({"messages": messages}, "chat", char_tokenizer(chat_template=template))
    assert [part.text for part in parts if part.trained] == ["Ho<|im_end|>", "No<|im_end|>"]


def test_of_a_turn_with_several_tags_each_is_left_out(char_tokenizer):
    tag = "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}<|im_end|>"
    template = GENERATION.replace("{% generation %}{{ m.content }}<|im_end|>", tag)
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    parts = segments({"messages": messages}, "chat", char_tokenizer(chat_template=template))
    assert [part.text for part in parts if part.trained] == ["N", "o<|im_end|>"]


def test_a_chat_may_begin_with_the_assistant(char_tokenizer):
    greeting = [{"role": "assistant", "content": "Welcome"}, *CHAT[:2]]
    parts = segments({"messages": greeting}, "chat", char_tokenizer(chat_template=CHATML))
    assert [part.text for part in parts if part.trained] == ["Welcome<|im_end|>", "Ho<|im_end|>"]
    assert parts[0].text == "<|im_start|>assistant\n"


def test_content_is_given_in_parts_to_a_template_that_shows_only_those(char_tokenizer):
    in_parts = CHATML.replace("m.content", "m.content[0]['text']").replace("{% for m", "{% for m", 1)
    in_parts = in_parts.replace("{{ '<|im_start|>'", "{% set _ = m.content[0].text.strip() %}{{ '<|im_start|>'")
    assert segments({"messages": CHAT}, "chat", char_tokenizer(chat_template=in_parts)) == CHATML_SEGMENTS


@pytest.mark.parametrize(
    ("template", "eos", "ends"),
    [
        (CHATML, "</s>", {2, 4}),  # what ends a turn is not EOS
        (CHATML, "<|im_end|>", {4}),
        (CHATML.replace("<|im_end|>\n", "<|im_end|></s>"), "</s>", {2}),  # EOS is there, so it ends a turn
        (None, "</s>", {2}),
    ],
)
def test_what_ends_a_trained_turn_ends_generation(char_tokenizer, template, eos, ends):
    assert end_ids(char_tokenizer(chat_template=template, eos_token=eos)) == ends


@pytest.mark.parametrize("chat", [CHAT[:2], [{"role": "system", "content": "Sys"}, *CHAT]])
def test_chats_through_real_templates_train_the_answers(char_tokenizer, shared_data, chat):
    """The answers and nothing of the questions; in the text that transformers renders, or after its prompt of generation."""
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    equal = after_prompt = 0
    for file in sorted((shared_data / "real_files" / "templates").glob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        tokenizer = char_tokenizer(chat_template=template)
        try:
            examples = examples_of({"messages": chat}, "chat", tokenizer)
        except UserError as error:
            assert "does not take these messages" in str(error), file.name  # two that refuse a system message
            continue
        trained = "".join(part.text for parts in examples for part in parts if part.trained)
        assert "Ho" in trained and ("No" in trained or len(chat) == 2), file.name
        assert "Hi" not in trained and "More" not in trained, file.name
        text = "".join(part.text for part in examples[-1])
        in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]
        messages = in_parts if _takes_parts(template) else chat
        options = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
        (theirs,), _ = jinja.render_jinja_template([messages], **options)
        (prompt,), _ = jinja.render_jinja_template([messages[:-1]], **options, add_generation_prompt=True)
        # Their dates are today's.
        text, theirs, prompt = (
            re.sub(r"\d\d \w{3,9} 20\d\d|20\d\d-\d\d-\d\d", "", each) for each in (text, theirs, prompt)
        )
        is_equal = text.removesuffix("</s>") == theirs.removesuffix("</s>")
        assert is_equal or text.startswith(prompt), file.name
        equal, after_prompt = equal + is_equal, after_prompt + (not is_equal)
    assert (equal, after_prompt) == ((57, 9) if len(chat) == 2 else (53, 12))


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
