"""A SentencePiece model (Llama 1 and 2, Mistral) as the tokenizer.json that Hugging Face would have made of it.

One idea: SentencePiece's byte-pair encoding joins the two neighbours whose concatenation has the best score, so its
merges are every way to cut a piece into two pieces, the best score first. transformers 5 makes the same of a bare
tokenizer.model but goes by ids instead of scores, and so cuts "two  spaces" as no model was trained on.

Left out: SentencePiece's other algorithm (unigram), text normalization, and pieces set by a user; `tokenizer_json` tries
its result on the whole vocabulary, and where it gives other ids than SentencePiece there is no result.
"""

import json

import sentencepiece
import tokenizers

SPACE = "▁"  # how SentencePiece writes a space


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, markers: dict[str, int]) -> dict | None:
    """The content of a tokenizer.json that gives the model's ids, or None where that cannot be had.

    `markers` are the special tokens and their ids, the model's own control pieces and those added behind them.
    """
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    spelt = {
        model.id_to_piece(i): i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    merges = [
        (-model.get_score(i), -cut, piece[:cut], piece[cut:])
        for piece, i in spelt.items()
        for cut in range(1, len(piece))
        if piece[:cut] in spelt and piece[cut:] in spelt
    ]
    # Of the same score are only runs of spaces, where SentencePiece lets the leftmost grow first.
    merges.sort()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prepend = {"type": "Prepend", "prepend": SPACE}
    to_pieces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_text = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | flags for text, i in sorted(markers.items(), key=lambda m: m[1])],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, to_pieces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [to_text, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": model.id_to_piece(model.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, _, left, right in merges],
        },
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    texts = _texts(list(spelt))
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return spec if found == model.encode(texts) else None


def _texts(pieces: list[str]) -> list[str]:
    """Texts that a wrong conversion would fail on: all the pieces, with each other, spaces, and what is no piece."""
    words = [piece.replace(SPACE, " ") for piece in pieces]
    runs = [f"a{' ' * i}b{' ' * i}" for i in range(40)]
    return [
        *("".join(words[i : i + 9]) for i in range(0, len(words), 9)),
        *runs,
        "",
        "\t x\r\n\n",
        "ﬁ x² e\u0301 \u3000 𒀀",
    ]
