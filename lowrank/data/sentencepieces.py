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
from tokenizers import decoders, models, normalizers

SPACE = "▁"  # how SentencePiece writes a space


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, markers: dict[str, int]) -> dict | None:
    """The content of a tokenizer.json that gives the model's ids; None for a model that cannot be converted.

    `markers` are the special tokens and their ids: the model's control pieces, and tokens added after them.
    """
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)}
    spelt = {piece: i for piece, i in vocab.items() if i not in special}
    merges = sorted(  # only runs of spaces have equal scores; SentencePiece lets the leftmost grow first
        (-model.get_score(i), -cut, piece[:cut], piece[cut:])
        for piece, i in spelt.items()
        for cut in range(1, len(piece))
        if piece[:cut] in spelt and piece[cut:] in spelt
    )
    bpe = models.BPE(vocab, [(left, right) for *_, left, right in merges], byte_fallback=True, fuse_unk=True)
    bpe.unk_token = model.id_to_piece(model.unk_id())
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_special_tokens(sorted(markers, key=markers.__getitem__))
    tokenizer.encode_special_tokens = True
    texts = telling_texts(list(spelt))
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return json.loads(tokenizer.to_str()) if found == model.encode(texts) else None


def telling_texts(pieces: list[str]) -> list[str]:
    """Texts that show another reading of a model: all pieces in combination, runs of spaces, characters without a piece."""
    words = [piece.replace(SPACE, " ") for piece in pieces]
    joined = ["".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    runs = [f"a{' ' * i}b{' ' * i}" for i in range(40)]
    return [*joined, *runs, "", "\t x\r\n\n", "ﬁ x² e\u0301 \u3000 𒀀"]
