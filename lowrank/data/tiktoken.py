"""Meta's Llama 3 vocabulary, `tokenizer.model` in tiktoken's format, as a tokenizer.json describes a tokenizer.

The file has a line for each token: its bytes in base64, and its rank, which is its id. tiktoken joins again and again
the two neighbours whose union has the lowest rank; a byte-pair model does the same with a list of pairs, so the list is
every way to cut a token into two tokens, in the order of the tokens' ranks. What the file does not say is in Meta's
code (github.com/meta-llama/llama-models, `models/llama3/tokenizer.py`): how text is cut into words, and 256 special
tokens behind the others. Their names are those of Llama 3.1 and later; Llama 3 called the pad, eom and python_tag ones
reserved. `transformers` made the models' tokenizer.json in the same way.
"""

import base64
import binascii
import pathlib
import re

from lowrank.errors import UserError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
NAMED = {
    0: BOS,
    1: EOS,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
SPECIAL_TOKENS = 256
# Meta's prompt format (llama.com/docs, "Prompt format"); what is between the generation tags is trained.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def is_tiktoken(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(200)) is not None


def read_spec(path: pathlib.Path) -> dict:
    """The content of a tokenizer.json that encodes as tiktoken does. UserError if the file is not a whole vocabulary."""
    ranks = _read_ranks(path)
    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += [(spelt[a], spelt[b]) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    special = [_special(i) for i in range(SPECIAL_TOKENS)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "ignore_merges": True, "vocab": {spelt[token]: rank for token, rank in ranks.items()}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": _bos_first(len(ranks)),
        "decoder": as_bytes,
        "model": model | {"merges": merges},
    }


def _read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number + 1}: not a token in base64 and its rank; copy it again") from None
        if token in ranks or rank != number:
            wrong = "repeats a token" if token in ranks else f"has rank {rank}, not {number}"
            raise UserError(f"{path}, line {number + 1}: {wrong}; copy it again")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} of the 256 single bytes, so not all text has ids; copy it again")
    return ranks


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a tokenizer.json: itself, or one from 256 on (GPT-2's scheme)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _special(i: int) -> str:
    """The name of the i-th special token; those without one of their own are reserved, and counted."""
    return NAMED.get(i) or f"<|reserved_special_token_{i - sum(named < i for named in NAMED)}|>"


def _bos_first(bos_id: int) -> dict:
    """What puts BOS before a text in transformers; lowrank puts it there itself."""
    bos, text = ({"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }
