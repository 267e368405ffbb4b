"""Convert the vocabulary file of Meta's Llama 3 to a tokenizer.json.

One idea: the file lists byte strings with ranks (a line each: base64, a space, the rank), and tiktoken repeatedly joins the
two neighbours whose concatenation has the lowest rank. That is byte-pair encoding whose merges are every split of a token
into two tokens, in the order of the ranks. The rest of the tokenizer is in Meta's code and not in the file: how a text is
split into words, the 256 special tokens after the 128,000 ranks, and the chat format.

Left out: the tiktoken files of other models (OpenAI's, Llama 4's), which split texts differently and have other tokens.
"""

import binascii
import re

from lowrank.errors import UserError
from lowrank.files import paths

RANKS = 128_000

# The special tokens by the names of Hugging Face's Llama 3.1, 3.2 and 3.3 (their tokenizer.json). Meta's own code (the
# llama-models repository) calls 128005 <|step_id|> and so counts the reserved ones after <|python_tag|> from 2; in
# Llama 3.0 these are reserved tokens: <|finetune_right_pad_id|> (2), 128005 (3), <|eom_id|> (4), <|python_tag|> (5).
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",  # the end of a message to a tool
    9: "<|eot_id|>",  # the end of a turn
    10: "<|python_tag|>",
}
BOS, EOS = NAMED[0], NAMED[1]

# How Llama 3 splits a text: contractions, words with the sign before them, at most three digits, signs, spaces.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Meta's prompt format, without the dates of Hugging Face's template for 3.1.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
{%- if message.role == "assistant" %}
{%- generation %}{{ message.content | trim }}<|eot_id|>{% endgeneration %}
{%- else %}
{{- message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


def is_tiktoken(path: paths.Path) -> bool:
    """Whether a file begins as a tiktoken vocabulary does (a SentencePiece model begins with a line break)."""
    with path.open("rb") as file:
        return re.match(rb"\S+ \d+\r?\n", file.read(200)) is not None


def read_ranks(path: paths.Path) -> list[bytes]:
    """The vocabulary's byte strings in the order of their ranks. UserError for a damaged file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, number_of_rank = line.split()
            token, rank = binascii.a2b_base64(encoded, strict_mode=True), int(number_of_rank)
        except ValueError:
            raise _damaged(path, f"line {number} is not a base64 text and a rank") from None
        if token in ranks:
            raise _damaged(path, f"line {number} repeats the token of rank {ranks[token]}")
        ranks[token] = rank
    if len(ranks) < RANKS:
        raise _damaged(path, f"it ends after {len(ranks)} of Llama 3's {RANKS} ranks")
    if len(ranks) > RANKS:
        raise UserError(
            f"{path} has {len(ranks)} ranks and Llama 3's vocabulary {RANKS}; other tiktoken files are not supported: "
            "put the tokenizer.json of the model's Hugging Face folder beside it"
        )
    tokens = sorted(ranks, key=ranks.__getitem__)
    wrong = next((i for i, token in enumerate(tokens) if ranks[token] != i), None)
    if wrong is not None:
        raise _damaged(path, f"rank {wrong} is missing or there twice")
    bytes_left = [f"0x{i:02x}" for i in range(256) if bytes([i]) not in ranks]
    if bytes_left:
        raise _damaged(path, f"it has no token for the bytes {', '.join(bytes_left)}")
    return tokens


def _damaged(path: paths.Path, what: str) -> UserError:
    return UserError(f"{path} is a damaged tiktoken vocabulary ({what}): copy tokenizer.model from the base again")


def tokenizer_json(tokens: list[bytes]) -> dict:
    """The content of a tokenizer.json that gives tiktoken's ids.

    A word that is a token is looked up (`ignore_merges`), as in tiktoken. Otherwise both join the neighbours of the lowest
    rank, the leftmost first. Listing a token with all of its splits changes nothing: the merges inside text that becomes
    one token do not depend on the text around it, so only one of its splits ever occurs.
    """
    spelt = {token: token.decode("latin-1").translate(BYTE_SPELLING) for token in tokens}
    merges = [
        [spelt[token[:cut]], spelt[token[cut:]]]
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in spelt and token[cut:] in spelt
    ]
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    special = [NAMED.get(i) or next(reserved) for i in range(256)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": RANKS + i, "content": text} | flags for i, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "ignore_merges": True,
            "vocab": {text: rank for rank, text in enumerate(spelt.values())},
            "merges": merges,
        },
    }


# GPT-2's spelling of bytes in a tokenizer.json: printable Latin-1 as itself, the others from U+0100 on.
UNPRINTABLE = (*range(0x21), *range(0x7F, 0xA1), 0xAD)
BYTE_SPELLING = {byte: chr(0x100 + i) for i, byte in enumerate(UNPRINTABLE)}
