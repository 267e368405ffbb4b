"""Generate text with a base, with or without an adapter: from prompts, or in a chat.

    python -m lowrank.generate --base=DIR --adapter=runs/alpaca --prompt="Name three colours."
    python -m lowrank.generate --base=DIR --prompts=prompts.txt --max_new_tokens=64 > answers.txt
    python -m lowrank.generate --base=DIR --adapter=runs/chat --chat

The text goes to stdout, everything else to stderr. Prompts are put into the format that the adapter was trained on;
without an adapter, or with --format=text, the model gets them as they are.
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from lowrank.cli import run as cli
from lowrank.config import DTYPES, FORMATS
from lowrank.errors import UserError

if TYPE_CHECKING:
    from lowrank.inference import Model

flags.DEFINE_string("base", None, "The base: a folder with a checkpoint, or a name on the hub.")
flags.DEFINE_string(
    "adapter", None, "An adapter: the workdir of a run, a folder of PEFT or mlx-lm, or a name on the hub."
)
flags.DEFINE_string("step", None, "Which checkpoint of a workdir: a number, best or last. Default: the last.")
flags.DEFINE_multi_string("prompt", None, "A prompt (-: what stdin holds); may be given several times.")
flags.DEFINE_string(
    "prompts",
    None,
    "A file of prompts: a text with one a line, or any file of data (prompt; instruction, input; messages).",
)
flags.DEFINE_bool("chat", False, "Talk in the terminal; /reset begins anew, /exit or Ctrl-D ends.")
flags.DEFINE_enum("format", None, FORMATS, "How a prompt is put to the model. Default: as the adapter's data.")
flags.DEFINE_string("input", "", "The `input` that goes with --prompt in the alpaca format.")
flags.DEFINE_string("system", None, "The system message before each prompt, or of the chat.")
flags.DEFINE_integer("max_new_tokens", 256, "Tokens to generate at most.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; higher is more random.", lower_bound=0)
flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0 is off.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens that holds this much probability.")
flags.DEFINE_integer("seed", 0, "Of the random draws.")
flags.DEFINE_multi_string("stop", [], "A string that ends the text (and is left out); may be given several times.")
flags.DEFINE_integer("batch_size", 16, "Prompts generated side by side.", lower_bound=1)
flags.DEFINE_enum("dtype", None, DTYPES, "Held and computed in; default: as the checkpoint says.")
FLAGS = flags.FLAGS


def main(arguments: list[str]):
    from lowrank.data.prompts import read_prompts  # here, so that --help does not wait for JAX
    from lowrank.generation.decode import Sampling
    from lowrank.generation.text import check_options
    from lowrank.inference import load
    from lowrank.runs.console import counting

    cli.refuse_unknown(arguments)
    if not FLAGS.base:
        raise UserError("--base is missing; say --base=DIR, the folder of a checkpoint")
    if (FLAGS.prompt is not None) + (FLAGS.prompts is not None) + FLAGS.chat != 1:
        raise UserError("give one of --prompt=TEXT, --prompts=FILE and --chat")
    if FLAGS.chat and FLAGS.format not in (None, "chat"):
        raise UserError(f"--format={FLAGS.format} does not go with --chat, which uses the chat format; leave one out")
    if FLAGS.prompts is not None:
        prompts = read_prompts(FLAGS.prompts, FLAGS.input)
    else:
        try:
            prompts = [(sys.stdin.read() if prompt == "-" else prompt, FLAGS.input) for prompt in FLAGS.prompt or ()]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt=-: what stdin holds is not {error.encoding} text ({error.reason})") from None
        if "-" in (FLAGS.prompt or ()) and not all(prompt for prompt, _ in prompts):
            raise UserError("--prompt=-: stdin holds nothing; pipe the prompt into the command")
    names = ("max_new_tokens", "stop", "temperature", "top_k", "top_p", "seed")
    options = {name: FLAGS[name].value for name in names}
    check_options(FLAGS.max_new_tokens, FLAGS.stop)
    Sampling(**{name: options[name] for name in names[2:]})  # refuses bad values before a base is read
    model = load(FLAGS.base, FLAGS.adapter, step=FLAGS.step, dtype=FLAGS.dtype)
    if FLAGS.chat:
        if model.format not in (None, "chat"):
            print(f"the adapter was trained in the {model.format} format, not for chat", file=sys.stderr)
        return chat(model, options)
    if model.format and not FLAGS.format:
        print(f"prompts are put into the adapter's format: {model.format} (--format changes it)", file=sys.stderr)
    format = FLAGS.format or model.format or "text"
    rows = [model.encode(prompt, input, format, FLAGS.system) for prompt, input in prompts]
    if len(rows) == 1:
        for _, piece in model.stream(rows, **options):
            print(piece, end="", flush=True)
        print()
        return None
    with counting("prompts", len(rows)) as show:
        for start in range(0, len(rows), FLAGS.batch_size):
            batch = rows[start : start + FLAGS.batch_size]
            texts = [""] * len(batch)
            for pieces, (row, piece) in enumerate(model.stream(batch, first=start, **options), start=1):
                texts[row] += piece
                show(start + min(pieces / FLAGS.max_new_tokens, len(batch)))  # a piece has a token, or a few
            for number, text in enumerate(texts, start=start + 1):
                print(f"=== {number}\n{text}", flush=True)
            show(start + len(batch))
    return None


def chat(model: "Model", options: dict) -> None:
    """A conversation in the terminal; each turn sees all turns before it."""
    messages: list[dict] = []
    print("/reset begins anew, /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: this is not {error.encoding} text ({error.reason}); write it again", file=sys.stderr)
            continue
        if text == "/exit":
            return
        if text == "/reset":
            messages = []
        if text in ("", "/reset"):
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for _, piece in model.stream([model.encode(messages, system=FLAGS.system)], **options):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # ends the answer, not the conversation
            pass
        except UserError as error:  # the conversation is too long
            messages.pop()
            print(f"error: {error}, or say /reset", file=sys.stderr)
            continue
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    cli.run(main)
