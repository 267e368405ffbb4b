"""Let a base, with or without an adapter, go on from a prompt.

    python -m lowrank.generate --base=DIR --adapter=runs/alpaca --prompt="Name three colours."
    python -m lowrank.generate --base=DIR --prompts=prompts.txt --max_new_tokens=64 > answers.txt
    python -m lowrank.generate --base=DIR --adapter=runs/chat --chat

The text goes to stdout, everything else to stderr. A prompt is put into the format that the adapter was trained on
(`--format=text` gives it to the model as it is, which is also what happens without an adapter).
"""

import json
import sys

from absl import flags

from lowrank.cli import run as cli
from lowrank.data.examples import encode_prompt
from lowrank.data.prompts import FORMATS, format_chat
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.inference import model as model_lib
from lowrank.inference import text as text_lib
from lowrank.runs.adapter import read_adapter

flags.DEFINE_string("base", None, "The base: a folder with a checkpoint.")
flags.DEFINE_string("adapter", None, "An adapter: the workdir of a run (its latest step), or a PEFT folder.")
flags.DEFINE_multi_string("prompt", None, "A prompt; may be given several times.")
flags.DEFINE_string(
    "prompts", None, "A file of prompts: one a line, or JSON lines with `prompt` (or instruction, input)."
)
flags.DEFINE_bool("chat", False, "Talk in the terminal; /reset begins anew, /exit or Ctrl-D ends.")
flags.DEFINE_enum("format", None, FORMATS, "How a prompt is put to the model. Default: as the adapter's data.")
flags.DEFINE_string("input", "", "The `input` that goes with --prompt in the alpaca format.")
flags.DEFINE_integer("max_new_tokens", 256, "Tokens to generate at most.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; higher is more random.", lower_bound=0)
flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0 is off.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens that holds this much probability.")
flags.DEFINE_integer("seed", 0, "Of the random draws.")
flags.DEFINE_multi_string("stop", [], "A string that ends the text (and is left out); may be given several times.")
flags.DEFINE_integer("batch_size", 16, "Prompts generated side by side.", lower_bound=1)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Held and computed in; default: as the checkpoint says.")
FLAGS = flags.FLAGS


def main(arguments: list[str]):
    cli.refuse_unknown(arguments)
    if not FLAGS.base:
        raise UserError("--base is missing; say --base=DIR, the folder of a checkpoint")
    if (FLAGS.prompt is not None) + (FLAGS.prompts is not None) + FLAGS.chat != 1:
        raise UserError("give one of --prompt=TEXT, --prompts=FILE and --chat")
    if FLAGS.chat and FLAGS.format not in (None, "chat"):
        raise UserError(f"--format={FLAGS.format} does not go with --chat, which uses the chat format; leave one out")
    if not 0 < FLAGS.top_p <= 1:
        raise UserError(f"--top_p={FLAGS.top_p} must be above 0 and at most 1")
    asked = None if FLAGS.chat else read_prompts()
    adapter = read_adapter(FLAGS.adapter) if FLAGS.adapter else None
    model = model_lib.load(FLAGS.base, adapter, dtype=FLAGS.dtype)

    known = adapter.format if adapter else None
    if FLAGS.chat:
        if known not in (None, "chat"):
            print(
                f"the adapter was trained in the {known} format, not for chat: its answers may be poor", file=sys.stderr
            )
        return chat(model)
    form = FLAGS.format or known or "text"
    if known and not FLAGS.format:
        print(f"prompts are put into the adapter's format: {form} (--format changes it)", file=sys.stderr)
    rows = [text_lib.encode_prompt(prompt, given, form, model.tokenizer) for prompt, given in asked]
    for start in range(0, len(rows), FLAGS.batch_size):
        show(model, rows[start : start + FLAGS.batch_size], numbered=len(rows) > 1, first=start)
    return None


def read_prompts() -> list[tuple[str, str]]:
    """(prompt, input) pairs from the flags."""
    if FLAGS.prompt is not None:
        return [(prompt, FLAGS.input) for prompt in FLAGS.prompt]
    file = paths.path(FLAGS.prompts)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={file} cannot be read ({error}); name a text file with a prompt a line") from error
    asked = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            asked.append((line, FLAGS.input))
            continue
        try:
            record = json.loads(line)
            prompt, given = record.get("prompt", record.get("instruction")), record.get("input") or ""
        except (ValueError, AttributeError):
            prompt = given = None
        if not isinstance(prompt, str) or not isinstance(given, str):
            raise UserError(f"{file}, line {number}: no JSON object with a `prompt` or an `instruction` that is text")
        asked.append((prompt, given))
    if not asked:
        raise UserError(f"--prompts={file} holds no prompt; write one a line")
    return asked


def stream(model: model_lib.Model, rows: list[list[int]]):
    sampling = model_lib.Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed)
    return text_lib.stream_text(
        model.model, model.variables, model.tokenizer, rows, FLAGS.max_new_tokens, FLAGS.stop, sampling
    )


def show(model: model_lib.Model, rows: list[list[int]], numbered: bool, first: int):
    """Print one text as it comes; several texts, each under its number, when all of the batch are there."""
    if not numbered:
        for _, piece in stream(model, rows):
            print(piece, end="", flush=True)
        print()
        return
    texts = [""] * len(rows)
    for row, piece in stream(model, rows):
        texts[row] += piece
    for number, text in enumerate(texts, start=first + 1):
        print(f"=== {number}\n{text}", flush=True)


def chat(model: model_lib.Model):
    """A conversation in the terminal, each turn seeing all before it."""
    messages: list[dict] = []
    print("/reset begins anew, /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages.clear()
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for _, piece in stream(
                model, [encode_prompt(format_chat(messages, model.tokenizer), "chat", model.tokenizer)]
            ):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # one answer is cut short, the conversation goes on
            pass
        except UserError as error:  # the conversation is too long
            messages.pop()
            print(f"error: {error}, or say /reset", file=sys.stderr)
            continue
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    cli.run(main)
