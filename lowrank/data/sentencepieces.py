"""Convert a SentencePiece model (Llama 1 and 2, Mistral) to a tokenizer.json.

One idea: SentencePiece's byte-pair encoding joins the two neighbours whose concatenation has the best score, so its
merges are every split of a piece into two pieces, the best score first. transformers 5 converts a bare
tokenizer.model too, but by ids instead of scores, and so splits "two  spaces" as no model was trained on.

Left out: SentencePiece's other algorithm (unigram), text normalization, and pieces set by a user; `tokenizer_json` tests
its result on the whole vocabulary, and returns None where the ids differ from SentencePiece's.
"""

import json

import sentencepiece
import tokenizers

SPACE = "▁"  # how SentencePiece writes a space


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, markers: dict[str, int]) -> dict | None:
    """The content of a tokenizer.json that gives the model's ids; None for a model that cannot be converted.

    `markers` are the special tokens and their ids: the model's control pieces, and tokens added after them.
    """
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)}
    spelt = {piece: i for piece, i in vocab.items() if i not in special}
    merges = [
        (-model.get_score(i), -cut, piece[:cut], piece[cut:])
        for piece, i in spelt.items()
        for cut in range(1, len(piece))
        if piece[:cut] in spelt and piece[cut:] in spelt
    ]
    merges.sort()  # only runs of spaces have equal scores; SentencePiece lets the leftmost grow first
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
    """Texts that show a wrong conversion: all pieces in combination, runs of spaces, characters without a piece."""
    words = [piece.replace(SPACE, " ") for piece in pieces]
    joined = ["".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    runs = [f"a{' ' * i}b{' ' * i}" for i in range(40)]
    return [*joined, *runs, "", "\t x\r\n\n", "ﬁ x² e\u0301 \u3000 𒀀"]
