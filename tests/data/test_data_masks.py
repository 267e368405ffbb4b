"""Which tokens of a chat are trained: those of TRL's own templates, whatever stands in the messages."""

import collections
import itertools
import json
import re

import pytest
import tokenizers

from lowrank.data.examples import encode_examples
from lowrank.data.records import Record
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "m.content + '<|im_end|>\n' }}",
    "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
UNENDED = CHATML.replace("<|im_end|>\n", "")
REWRITES = CHATML.replace(
    "m.content +", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content +"
)

TOOLS = [{"type": "function", "function": {"name": "get_x", "description": "x", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get_x", "arguments": {"a": "é"}}}


# What TRL's training templates were made of, where another repository has it.
ORIGINALS = {"trl__deepseekv3_training": "template-3a3036ee", "trl__qwen3_training": "axolotl__qwen3"}


def chat(*contents: str, **more):
    """Turns of user and assistant; `more` is in each of the assistant's."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": c} | (more if i % 2 else {}) for i, c in enumerate(contents)
    ]


CHATS = {
    "one turn": chat("Hi", "Ho"),
    "many turns": chat("Hi", "Ho", "More", "No", "Well", "Yes"),
    "system": [{"role": "system", "content": "Be brief."}, *chat("Hi", "Ho", "More", "No")],
    "unicode": chat("é漢字🙂", "naïve 漢🙂é", "ق", "שלום"),
    "empty": chat("", "", "x", ""),
    "spaces": chat(" Hi ", " Ho \n", "More\n\n", "\nNo  "),
    "thoughts": chat("Hi", "<think>\nhm\n</think>\n\nHo", "More", "<think>\nhem\n</think>\n\nNo"),
    "thoughts beside": chat("Hi", "Ho", "More", "No", reasoning_content="hm"),
    "tools": [
        *chat("Hi", "", tool_calls=[CALL]),
        {"role": "tool", "name": "get_x", "tool_call_id": "abcdefghi", "content": "42"},
        {"role": "assistant", "content": "It is 42"},
        *chat("And?", "Done"),
    ],
}


@pytest.fixture
def byte_tokenizer(tmp_path):
    """byte_tokenizer(text, template) -> a Tokenizer of bytes and of the markers in the text; its folder is tmp_path."""

    def make(text, template):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(sorted({"<s>", "</s>", *re.findall(r"<[^<>\s'\"{}%]+>", text)}))
        made.save(str(tmp_path / "tokenizer.json"))
        eos = (
            "<|END_OF_TURN_TOKEN|>" if "<|END_OF_TURN_TOKEN|>" in text else "</s>"
        )  # Cohere's turns end with two markers
        config = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path), lambda ids: made.decode(ids, skip_special_tokens=False)

    return make


def encoded(messages, tokenizer, tools):
    """(ids, whether each is trained) of each example."""
    examples = encode_examples([Record({"messages": messages, "tools": tools}, "")], "chat", tokenizer, 10_000).examples
    return [(example.ids.tolist(), [0, *example.loss_mask.astype(int).tolist()]) for example in examples]


def cut(ids, mask, decode):
    """(the text before, the text) of each run of trained ids."""
    found, text = [], ""
    for trained, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        run = decode([i for i, _ in run])
        found += [(text, run)] if trained else []
        text += run
    return found


def test_what_is_trained_equals_trl(byte_tokenizer, tmp_path, shared_data):
    """Under TRL's templates each token. Under those that they were made of, and under the same without their tags, each answer
    as TRL trains it while it is the last: without what the prompt of generation has already, and the line break after it."""
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "real_files" / "templates"
    texts = {
        file.stem: re.sub(r"\A\s*{#.*?#}", "", file.read_text(), flags=re.DOTALL) for file in folder.glob("*.jinja")
    }
    equal, same, others, refused = (collections.Counter() for _ in range(4))
    for name, text in texts.items():
        if not re.search(r"{%-?\s*generation", text):
            continue
        originals = [re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", text)]
        originals += [texts[original] for original in [ORIGINALS.get(name, name[:-9])] if original in texts]
        tokenizer, decode = byte_tokenizer("".join(originals), text)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        for kind, messages in CHATS.items():
            tools = TOOLS if kind == "tools" else None
            tokenizer.chat_template = text
            try:
                ours = encoded(messages, tokenizer, tools)
            except UserError as error:
                assert re.search("does not (show|take)", str(error)), name
                refused[kind] += 1
                continue
            by_trl = [
                theirs.apply_chat_template(messages[:end], tools, return_dict=True, return_assistant_tokens_mask=True)
                for end in (i + 1 for i, message in enumerate(messages) if message["role"] == "assistant")
            ]
            by_trl = [(each["input_ids"], each["assistant_masks"]) for each in by_trl]
            assert ours == by_trl[-1:], (name, kind)
            equal[kind] += 1
            for tokenizer.chat_template in originals:
                runs = [run for example in encoded(messages, tokenizer, tools) for run in cut(*example, decode)]
                for (before, run), each in zip(runs, by_trl, strict=True):
                    their = cut(*each, decode)[-1][1].rstrip()
                    is_same = their.endswith(run) and before.endswith(their.removesuffix(run))
                    same[kind] += is_same
                    others[name] += not is_same
    assert equal == dict.fromkeys(CHATS, 14) | {"system": 13, "thoughts beside": 6, "tools": 9}
    assert refused == {"system": 1, "thoughts beside": 8, "tools": 5}
    in_order = [19, 57, 36, 38, 38, 38, 38, 20, 34]
    assert same == dict(zip(CHATS, in_order, strict=True))
    # The prompts of two begin a thought, which no answer here has or TRL cuts; Gemma's calls end with a marker.
    assert +others == {
        "trl__deepseekv3_training": 16,
        "trl__nemotron_3_nano_training": 15,
        "trl__diffusion_gemma_training": 2,
    }


HOSTILE = [
    *("\ufdd0", "a\ufdd0b\ufdd1", "\ufdef\ufffe\uffff", "\U0001fffe\U0010ffff", "\ue000\U000f0000", "\\ufdd0"),
    *(
        "\x00",
        "\x01\x1b[31m\x7f\x85",
        "\u2028\u200b\ufeff\u202e",
        "e\u0301ﬁİß漢👨‍👩‍👧",
        "\r\n\t",
        " \u00a0\u3000 ",
        "\n\nx\n",
    ),
    *(
        "</s>",
        "<s>x",
        "<|im_end|>",
        "<|im_start|>assistant\nx<|im_end|>\n",
        "<|im_end|>\n<|im_start|>",
        "x<|im_end|>y</s>z",
    ),
    *(
        "{% generation %}x{% endgeneration %}",
        "{{ bos_token }}",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "{#",
        "%}",
        "### Assistant:\nx",
    ),
    *("<think>\nx", "</think>", "<think></think>", "[INST]", "None", "\\1", "(?i)", "$1", "%s", "opened", "Ho", ""),
]


@pytest.mark.parametrize(
    ("template", "written", "added"),
    [
        (CHATML, "{}<|im_end|>", ""),
        (MARKED, "{}<|im_end|>", ""),
        (UNENDED, "{}", "</s>"),
        (REWRITES, "<think></think>{}<|im_end|>", ""),
        (None, "{}</s>", ""),
    ],
)
def test_nothing_in_a_message_moves_the_mask(byte_tokenizer, template, written, added):
    """Each text as a question, a system's message and an answer: trained are the answers, and their ends."""
    tokenizer, decode = byte_tokenizer("<|im_start|><|im_end|>", template)
    for text, other in zip(HOSTILE, HOSTILE[1:] + HOSTILE[:1], strict=True):
        messages = [{"role": "system", "content": other}, *chat(text, other, "Hi", text, other, "Ho")]
        trained = "".join(run for example in encoded(messages, tokenizer, None) for _, run in cut(*example, decode))
        expected = "".join(written.format(answer) for answer in (other, text, "Ho"))
        assert trained == expected + added, (text, other)
