"""Chats: messages become text through a base's chat template, and the assistant's turns are found in that text.

One idea: an answer is trained after exactly the prompt that generation will give it. Most templates write a conversation so
that every prompt is a beginning of the whole text; then a chat is one example, in which each of the assistant's turns is
trained with its end token. Some rewrite earlier turns (Qwen 3 drops their thoughts) or end the prompt of generation in text
that no answer has (`<think>`, in DeepSeek-R1 and QwQ). Then a chat becomes an example for each answer: the prompt as generation
gives it, and the answer as it is rendered while it is the last. A template may also mark the trained text itself, by
`{% generation %}`, as transformers and TRL read it.

Left out: images and other parts of a message that are not text.
"""

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError

# For a base without a template: headings that any tokenizer can encode, and EOS after each of the assistant's turns.
DEFAULT_TEMPLATE = """\
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

# Unicode reserves these for a program's own use. Those that stand in no message mark places in a rendered text.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# Llama 3's templates write today's date into the prompt. A resumed run must see the same examples, and generation the
# prompt that was trained, so the date is always the one those templates fall back to.
TODAY = datetime.datetime(2024, 7, 26)

# What a message's thoughts are called beside its content. Templates know one of these names.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


class Segment(NamedTuple):
    """A part of an example's text, whether it is trained, and whether EOS ends it (the last part's does always)."""

    text: str
    trained: bool
    ends: bool = False


def format_chat(messages: Sequence[Message], tokenizer: Tokenizer, tools: list | None = None) -> str:
    """A conversation up to the start of the assistant's next turn: a prompt of generation."""
    return _render(messages, tokenizer, tools, prompt=True)


def chat_segments(messages: list[Message], tokenizer: Tokenizer, tools: list | None = None) -> list[list[Segment]]:
    """A conversation as the segments of one or more examples, in which the assistant's turns are trained with their ends.

    A turn whose message says `weight: 0` or `train: false` is not trained. UserError if the template does not take the
    messages, or leaves one of them out.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in answers if message_is_trained(messages[i])]
    _refuse_dropped(messages, tokenizer, tools)
    if not trained:
        return [[Segment(_render(messages, tokenizer, tools), False)]]
    if _marks_generation(_template(tokenizer)):
        return [_marked_segments(messages, answers, trained, tokenizer, tools)]
    text = _render(messages, tokenizer, tools)
    afters = {i: _render(messages[: i + 1], tokenizer, tools) for i in answers}
    befores = {i: _prompt_before(messages, i, afters[i], tokenizer, tools) for i in answers}
    if all(
        text.startswith(afters[i]) and afters[i].startswith(befores[i]) and not _is_cut(messages[i], afters[i])
        for i in answers
    ):
        found, at = [], 0
        for i in trained:
            turn = _until_end(afters[i][len(befores[i]) :], tokenizer)
            turn += _next_start(text[len(befores[i]) + len(turn) :], tokenizer)
            found += [Segment(text[at : len(befores[i])], False), Segment(turn, True)]
            at = len(befores[i]) + len(turn)
        return [_stopped([*found, Segment(text[at:], False)], tokenizer)]
    return [_answer_alone(messages[: i + 1], befores[i], afters[i], tokenizer, tools) for i in trained]


def message_is_trained(message: Message) -> bool:
    """By OpenAI's `weight` and axolotl's `train` (or `training`)."""
    flags = [message.get("weight"), message.get("train"), message.get("training")]
    return all(flag is None or bool(flag) for flag in flags)


def turn_end(tokenizer: Tokenizer) -> str:
    """The token that ends the assistant's turns: EOS if the template writes it after an answer, else the first special token
    that it writes there, else the one that begins the next message (as in GLM 4), else EOS."""
    return _turn_end(tokenizer)[0]


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end generation: EOS, and what ends a turn in the tokenizer's chat template."""
    end = tokenizer.markers.get(turn_end(tokenizer)) if tokenizer.chat_template else None
    return {i for i in (tokenizer.eos_id, end) if i is not None}


def _turn_end(tokenizer: Tokenizer) -> tuple[str, bool]:
    """The end of a turn, and whether the template writes it after the last turn, too."""
    return _end_in(_template(tokenizer), tokenizer.bos_token, tokenizer.eos_token, tuple(tokenizer.markers))


@functools.lru_cache(maxsize=64)
def _end_in(template: str, bos_token: str, eos_token: str, markers: tuple[str, ...]) -> tuple[str, bool]:
    contents = _, answer, _ = NONCHARACTERS[:3]
    messages = [{"role": "user", "content": content} for content in contents]
    messages[1]["role"] = "assistant"
    messages = [_in_parts(message) for message in messages] if _takes_parts(template) else messages
    variables = _OPTIONS | {"bos_token": bos_token, "eos_token": eos_token}
    try:
        last, later = (_compile(template).render(messages=messages[:n], **variables) for n in (2, 3))
    except (jinja2.TemplateError, TypeError, ValueError):
        return eos_token, True
    after = last.partition(answer)[2]
    found = [marker for marker in markers if marker and marker in after]
    if found:
        first = min(found, key=lambda marker: (after.index(marker), -len(marker)))
        return eos_token if eos_token in found else first, True
    before, after = (later.partition(content)[2] for content in contents[:2])
    starts = [marker for marker in markers if marker and after.startswith(marker) and not before.startswith(marker)]
    return max(starts, key=len, default=eos_token), False


def _next_start(rest: str, tokenizer: Tokenizer) -> str:
    """The special token that begins the next message, where nothing else ends a turn."""
    end, is_written = _turn_end(tokenizer)
    if is_written or end == tokenizer.eos_token:
        return ""
    return max((marker for marker in tokenizer.markers if rest.startswith(marker)), key=len, default="")


# ---- Finding turns -----------------------------------------------------------------------------------------------------


def _prompt_before(messages: list[Message], i: int, after: str, tokenizer: Tokenizer, tools: list | None) -> str:
    """The prompt of generation that message `i` answers. Before a greeting it is what the template writes before it."""
    if all(message["role"] in ("system", "developer") for message in messages[:i]):
        return _around(messages[: i + 1], tokenizer, tools)[0]
    prompt = _render(messages[:i], tokenizer, tools, prompt=True)
    header = _header(_template(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
    # After a tool's answer Gemma 4 has no header in its prompts, but one in a conversation.
    return prompt + header if not prompt.endswith(header) and after.startswith(prompt + header) else prompt


@functools.lru_cache(maxsize=64)
def _header(template: str, bos_token: str, eos_token: str) -> str:
    """What a prompt of generation ends in, after a question."""
    message = {"role": "user", "content": NONCHARACTERS[0]}
    variables = _OPTIONS | {"messages": [_in_parts(message) if _takes_parts(template) else message]}
    variables |= {"bos_token": bos_token, "eos_token": eos_token}
    with contextlib.suppress(jinja2.TemplateError, TypeError, ValueError):
        without, text = (_compile(template).render(variables | {"add_generation_prompt": on}) for on in (False, True))
        return text.removeprefix(without)
    return ""


def _around(messages: list[Message], tokenizer: Tokenizer, tools: list | None) -> tuple[str, str]:
    """What the template writes before the content of the last message, and after it."""
    (mark,) = _unused(1, messages, tools)
    before, found, after = _render([*messages[:-1], {**messages[-1], "content": mark}], tokenizer, tools).partition(
        mark
    )
    if not found:
        raise UserError(f"the chat template does not write the content of message {len(messages)}")
    return before, after


def _answer_alone(
    messages: list[Message], before: str, after: str, tokenizer: Tokenizer, tools: list | None
) -> list[Segment]:
    """An example of the last message alone, after the prompt that generation gives."""
    is_cut = _is_cut(messages[-1], after)
    start, end = ("", "") if after.startswith(before) and not is_cut else _around(messages, tokenizer, tools)
    if is_cut:
        # The thoughts that a template cuts out are what is to be learnt. Mostly the prompt begins them: `<think>` is in both.
        content = messages[-1]["content"]
        shared = max((n for n in range(1, len(content) + 1) if before.endswith(content[:n])), default=0)
        answer = content[shared if content[:shared].strip() else 0 :] + end
    elif after.startswith(before):
        answer = after[len(before) :]
    elif after.startswith(start) and not any(messages[-1].get(name) for name in THOUGHTS):
        answer = after[len(start) :]
    else:
        shared = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
        before, answer = after[:shared], after[shared:]
    turn = _until_end(answer, tokenizer)
    return _stopped([Segment(before, False), Segment(turn, True), Segment(answer[len(turn) :], False)], tokenizer)


def _is_cut(message: Message, text: str) -> bool:
    """Whether a text lacks a part of the message's content; spaces may differ."""
    return "".join((message.get("content") or "").split()) not in "".join(text.split())


def _marked_segments(messages, answers, trained, tokenizer: Tokenizer, tools: list | None) -> list[Segment]:
    """The segments that a template's `{% generation %}` tags mark."""
    opened, closed = marks = _unused(2, messages, tools)
    text = _render(messages, tokenizer, tools, marks=marks)
    turn = f"({opened}.*?{closed}(?:{re.escape(tokenizer.eos_token)})?)"  # some templates leave the end token outside
    marked, turns = text.count(opened), list[int]()
    if len(trained) < len(
        answers
    ):  # a turn may have several tags: those that the text has more with it than without it
        for i in answers:
            count = _render(messages[: i + 1], tokenizer, tools, marks=marks).count(opened)
            turns += [i] * (count - len(turns))
        if len(turns) != marked:
            raise UserError("the chat template's {% generation %} tags do not tell which turn is not to be trained")
    parts, turn_of = [], iter(turns or [trained[0]] * marked)
    for part in filter(None, re.split(turn, text, flags=re.DOTALL)):
        is_trained = part.startswith(opened) and next(turn_of) in trained
        parts.append(Segment(part.replace(opened, "").replace(closed, ""), is_trained))
    return _stopped(parts, tokenizer)


def _until_end(turn: str, tokenizer: Tokenizer) -> str:
    """A turn up to its end token: ChatML and others put a line break after it."""
    end, is_written = _turn_end(tokenizer)
    if is_written and end in turn:  # not one that only stands in an answer
        return turn[: turn.rindex(end) + len(end)]
    return turn.rstrip() if _has_end(turn, tokenizer) else turn


def _has_end(text: str, tokenizer: Tokenizer) -> bool:
    """Whether the text ends with a special token, which tells the model to stop."""
    end, is_written = _turn_end(tokenizer)
    return text.rstrip().endswith(tuple(tokenizer.markers) if is_written else (end, tokenizer.eos_token))


def _stopped(parts: list[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments, with an end added where the template leaves the assistant's last turn without one."""
    last = max(i for i, part in enumerate(parts) if part.trained)
    if _has_end(parts[last].text, tokenizer) or any(part.text.strip() for part in parts[last + 1 :]):
        return parts
    return [*parts[: last + 1], Segment(turn_end(tokenizer), True)]


def _refuse_dropped(messages: list[Message], tokenizer: Tokenizer, tools: list | None) -> None:
    """Refuse what a template leaves out without a word: tools, calls of tools, thoughts, and messages of rarer roles."""

    def is_shown(i: int, **other) -> bool:
        """Whether the text changes with these fields of message `i`. Some templates show them only in the last message (Qwen
        3's thoughts), or in a prompt (Mistral's system message)."""
        message = {name: value for name, value in (messages[i] | other).items() if value is not None}
        changed = [*messages[:i], message, *messages[i + 1 :]]
        try:
            return any(
                _render(messages[:end], tokenizer, tools) != _render(changed[:end], tokenizer, tools)
                for end in (next((j for j in answers if j > i), i + 1), len(messages), i + 1)
            )
        except UserError:  # it is missed
            return True

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    dropped = []
    if tools and _render(messages, tokenizer, tools) == _render(messages, tokenizer):
        dropped.append("'tools'")
    for i, message in enumerate(messages):
        if message.get("tool_calls") and not is_shown(i, tool_calls=None, content=message.get("content") or ""):
            dropped.append(f"'messages[{i}].tool_calls'")
        thoughts = [name for name in THOUGHTS if message.get(name)]
        if thoughts and not is_shown(i, **dict.fromkeys(thoughts)):
            dropped.append(f"'messages[{i}].{thoughts[0]}'")
        is_rare = message["role"] not in ("user", "assistant") and message.get("content")
        if is_rare and not is_shown(i, content=_unused(1, messages, tools)[0]):
            dropped.append(f"'messages[{i}]' of the role {message['role']}")
    if dropped:
        raise UserError(f"the chat template does not show {', '.join(dropped)}; remove them or use another template")


# ---- Templates ---------------------------------------------------------------------------------------------------------

# What transformers gives a template. Some test `tools is not none`, which a name that is not defined passes.
_OPTIONS: dict[str, Any] = {
    "tools": None,
    "documents": None,
    "add_generation_prompt": False,
    "opened": "",
    "closed": "",
}


def _template(tokenizer: Tokenizer) -> str:
    return tokenizer.chat_template or DEFAULT_TEMPLATE


def _render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: list | None = None,
    prompt=False,
    marks: Sequence[str] = ("", ""),
) -> str:
    """`marks`: what stands before and after the text that a `{% generation %}` tag encloses."""
    template = _compile(_template(tokenizer))
    messages = [_with_thoughts(message) for message in messages]
    if _takes_parts(_template(tokenizer)):
        messages = [_in_parts(message) for message in messages]
    variables = {"tools": tools or None, "add_generation_prompt": prompt, "opened": marks[0], "closed": marks[1]}
    variables |= {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    try:
        try:
            return template.render(messages=messages, **_OPTIONS | variables)
        except TypeError:  # some templates join a call's arguments to text, most write an object as JSON
            return template.render(messages=_with_arguments_as_text(messages), **_OPTIONS | variables)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from None


@functools.cache
def _takes_parts(template: str) -> bool:
    """Whether a template shows content only as a list of parts, as those of models that see images do."""
    mark = NONCHARACTERS[0]
    for message in ({"role": "user", "content": mark}, _in_parts({"role": "user", "content": mark})):
        with contextlib.suppress(jinja2.TemplateError, TypeError, ValueError):
            if mark in _compile(template).render(messages=[message], bos_token="", eos_token="", **_OPTIONS):
                return isinstance(message["content"], list)
    return False


def _in_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message


def _with_thoughts(message: Message) -> Message:
    """A message with its thoughts under each name that a template may read, as transformers gives them."""
    thoughts = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _with_arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    def as_text(call: dict) -> dict:
        function = call.get("function", call)
        function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        return {**call, "function": function} if "function" in call else function

    return [
        m | {"tool_calls": [as_text(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """A template in a sandbox (it comes with somebody's weights), with the extensions that Hugging Face gives it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot be read ({error}): correct it in the base's folder") from None


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: puts its content between the variables `opened` and `closed`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened, closed = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in ("opened", "closed"))
        return [node.set_lineno(line) for node in (opened, jinja2.nodes.Scope(body), closed)]


def _marks_generation(template: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def _unused(count: int, messages: Sequence[Message], tools: list | None) -> list[str]:
    """So many characters that stand in no message."""
    text = json.dumps([messages, tools], ensure_ascii=False)
    unused = [character for character in NONCHARACTERS if character not in text][:count]
    if len(unused) < count:
        raise UserError("the messages hold all of Unicode's noncharacters U+FDD0 to U+FDEF; remove some")
    return unused


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
