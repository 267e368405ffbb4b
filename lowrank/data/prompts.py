"""Format records as text: the four formats, and which part of the text is trained.

One idea: every format is a list of `Segment`s, trained or not, and the same code makes the prompts of generation, so that a
model is prompted with exactly the text it was trained on.

    alpaca      {"instruction", "input" (optional), "output"}    the prompt of alpaca-lora, line for line
    completion  {"prompt", "completion"}                         joined as they are: mind the space between them
    chat        {"messages": [{"role", "content"}, ...]}         the model's own chat template, or the one below
    text        {"text"}, or a .txt file                         all of it is trained

In a chat the assistant's turns are trained, each with its end token. A template marks them by its `{% generation %}` tag;
without the tag they are found by rendering the chat turn by turn. Left out: tools and images.
"""

import datetime
import functools
import json
import re
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError

FORMATS = ("alpaca", "chat", "completion", "text")

ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""

ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

# For a base without a template: headings that any tokenizer can encode, and EOS after each of the assistant's turns.
DEFAULT_CHAT_TEMPLATE = """\
{% for message in messages %}
### {{ message.role | capitalize }}:
{% if message.role == "assistant" %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ "\n\n" }}
{%- else %}
{{ message.content }}{{ "\n\n" }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
### Assistant:
{% endif %}
"""

# Unicode reserves these two for a program's own use: they mark what `{% generation %}` encloses until it is cut out.
OPEN, CLOSE = "\ufdd0", "\ufdd1"

# Llama 3's templates write today's date into the prompt. A resumed run must see the same examples, and generation the
# prompt that was trained, so the date is always the one those templates fall back to.
TODAY = datetime.datetime(2024, 7, 26)


class Segment(NamedTuple):
    """A part of an example's text, and whether it is trained."""

    text: str
    trained: bool


def segments(fields: dict, format: str, tokenizer: Tokenizer) -> list[Segment]:
    """A record's text in order, without BOS and the last EOS, unless a chat template writes them."""
    if format == "alpaca":
        prompt = format_prompt("alpaca", fields["instruction"], fields.get("input") or "")
        return [Segment(prompt, False), Segment(fields["output"], True)]
    if format == "completion":
        return [Segment(fields["prompt"], False), Segment(fields["completion"], True)]
    if format == "text":
        return [Segment(fields["text"], True)]
    return chat_segments(fields["messages"], tokenizer)


def format_prompt(format: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None) -> str:
    """The text of a prompt for generation; `chat` needs the tokenizer for its template."""
    if format == "alpaca":
        return (ALPACA_WITH_INPUT if input else ALPACA).format(instruction=instruction, input=input)
    question = f"{instruction}\n\n{input}" if input else instruction
    if format != "chat":
        return question
    assert tokenizer
    return format_chat([{"role": "user", "content": question}], tokenizer)


def format_chat(messages: list[dict], tokenizer: Tokenizer) -> str:
    """A conversation up to the start of the assistant's next turn."""
    return _strip_frames(_render(messages, tokenizer, add_generation_prompt=True))


def chat_segments(messages: list[dict], tokenizer: Tokenizer) -> list[Segment]:
    """A conversation as segments: the assistant's turns with their end tokens, and everything else."""
    text = _render(messages, tokenizer)
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE):
        turn = f"({OPEN}.*?{CLOSE}(?:{re.escape(tokenizer.eos_token)})?)"  # some templates leave the end token outside
        parts = re.split(turn, text, flags=re.DOTALL)
        return _stopped([Segment(_strip_frames(part), part.startswith(OPEN)) for part in parts if part], tokenizer)

    found, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, add_generation_prompt=True)
        after = _render(messages[: i + 1], tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"the chat template rewrites earlier turns, so turn {i + 1} cannot be found in what it renders: "
                "put {% generation %}...{% endgeneration %} around the assistant's text in the template"
            )
        turn = after[len(before) :]
        if _has_end(turn, tokenizer):
            turn = turn.rstrip()  # ChatML and others put a line break after the end token
        found += [Segment(text[at : len(before)], False), Segment(turn, True)]
        at = len(before) + len(turn)
    return _stopped([*found, Segment(text[at:], False)], tokenizer)


def _has_end(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a special token, which tells the model to stop, ends the text."""
    return text.rstrip().endswith(tuple(tokenizer.markers))


def _stopped(parts: list[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments, with EOS added where the template leaves the assistant's last turn without an end token."""
    last = max((i for i, part in enumerate(parts) if part.trained), default=None)
    if last is None or _has_end(parts[last].text, tokenizer) or any(part.text.strip() for part in parts[last + 1 :]):
        return parts
    return [*parts[: last + 1], Segment(tokenizer.eos_token, True)]


def _render(messages: list[dict], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    try:
        return _compile(tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE).render(
            messages=messages,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            add_generation_prompt=add_generation_prompt,
            tools=None,  # templates test `tools is not none`, which an undefined name passes
            documents=None,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from None


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """A template in a sandbox (it comes with somebody's weights), with the extensions that Hugging Face gives it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    # Jinja's own filter escapes <, > and & for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot be read ({error}): correct it in the base's folder") from None


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: puts its content between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_frame"), [], [], body).set_lineno(line)

    def _frame(self, caller):
        return f"{OPEN}{caller()}{CLOSE}"


def _strip_frames(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")
