"""Format records as text, and say which part of the text is trained.

One idea: every format is a list of `Segment`s, trained or not, and the same code makes the prompts of generation, so that a
model is prompted with exactly the text it was trained on. What the formats' fields are, `records` says.

    alpaca      the prompt of alpaca-lora, line for line; a system message stands in the place of its first line
    completion  joined as they are: mind the space between prompt and completion
    chat        the model's own chat template, or the one in `chat`; the assistant's turns are trained, each with its end token
    text        all of it is trained
"""

from lowrank.data.chat import Segment, chat_segments, format_chat
from lowrank.data.files import read_rows, refuse
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError
from lowrank.files import paths

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


def segments(fields: dict, format: str, tokenizer: Tokenizer) -> list[list[Segment]]:
    """The text of a record in order, as one or more examples, without BOS and the last EOS, unless a template writes them."""
    if format == "chat":
        return chat_segments(fields["messages"], tokenizer, fields.get("tools"))
    if format == "completion":
        return [[Segment(fields["prompt"], False), Segment(fields["completion"], True)]]
    if format == "text":
        return [[Segment(fields["text"], True)]]
    # Earlier turns are trained, too. A later one begins with its instruction.
    turns = [(question, "", answer) for question, answer in fields.get("history") or ()]
    turns.append((fields["instruction"], fields.get("input") or "", fields["output"]))
    parts: list[Segment] = []
    for question, input, answer in turns:
        prompt = format_prompt("alpaca", question, input, system=fields.get("system"))
        if parts:
            prompt = "\n\n" + prompt.partition("\n\n")[2]
        parts += [Segment(prompt, False), Segment(answer, True, ends=True)]
    return [parts]


def format_prompt(
    format: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None, system: str | None = None
) -> str:
    """The text of a prompt for generation; `chat` needs the tokenizer for its template."""
    if format == "alpaca":
        text = (ALPACA_WITH_INPUT if input else ALPACA).format(instruction=instruction, input=input)
        return f"{system}\n\n{text.partition(chr(10) * 2)[2]}" if system else text
    question = f"{instruction}\n\n{input}" if input else instruction
    if format != "chat":
        return f"{system}\n\n{question}" if system else question
    assert tokenizer
    messages = [{"role": "system", "content": system}] if system else []
    return format_chat([*messages, {"role": "user", "content": question}], tokenizer)


def read_prompts(where: paths.PathLike, input: str = "") -> list[tuple[str | list[dict], str]]:
    """The prompts of a file, each with its input: a text's lines, or the texts, records or chats in other files of data.

    `input` goes with each prompt that has none of its own.
    """
    path = paths.path(where)
    prompts: list[tuple[str | list[dict], str]] = []
    problems = []
    for row in read_rows(path, lines=True):
        fields = row.fields if isinstance(row.fields, dict) else {"prompt": row.fields}
        found = [fields[name] for name in ("messages", "prompt", "instruction", "question", "text") if fields.get(name)]
        own = fields.get("input") or ""
        is_chat = bool(found) and isinstance(found[0], list) and all(isinstance(one, dict) for one in found[0])
        if found and (is_chat or isinstance(found[0], str)) and isinstance(own, str):
            prompts.append((found[0], own or input))
        else:
            named = f" (found: {', '.join(row.fields)})" if isinstance(row.fields, dict) else ""
            problems.append((row.where, f"no text, and no object with messages, a `prompt` or an `instruction`{named}"))
    refuse(path, problems)
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts
