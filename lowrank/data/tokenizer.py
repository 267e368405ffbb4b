"""Text to token ids and back, with the tokenizer of a base.

One idea: there are three ways to read a text, and confusing them raises no error. `encode` reads plain text, where
"</s>" is four characters and not the end of an example. With `continues` the text follows other text, so no space is put
before it (Llama 1 and 2 put one before the first word). `encode_markup` reads the output of a chat template, where "</s>"
*is* the token. None of them adds BOS or EOS.

`write_tokenizer` writes a tokenizer beside exported weights, in files that transformers reads as lowrank does.
Left out: training a tokenizer.
"""

import functools
import json
import pathlib
import re
from collections.abc import Sequence

import sentencepiece
import tokenizers

from lowrank.data import sentencepieces, tiktoken
from lowrank.errors import UserError
from lowrank.files import hub, paths

Offsets = list[tuple[int, int]]  # for each token: its first character, and the one after its last

# Appended to a SentencePiece model this turns `add_dummy_prefix` off: concatenated protocol buffers are merged, and these
# four bytes are {normalizer_spec: {add_dummy_prefix: false}}. Some releases of the library have no flag for it.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

MANY = 1000  # texts at once, from which on a SentencePiece model encodes by words
MOST_WORDS = 500_000  # whose ids are kept: some 200 MB
WORD = re.compile(" *[^ ]+| +")

# The files that a tokenizer may consist of.
COMPANIONS = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


class Tokenizer:
    """A tokenizer, whichever library does the work.

    `path` is its file; `vocab` the largest id + 1; `markers` maps special tokens' texts to their ids; `bos_token` and
    `eos_token` are texts, `bos_id` and `eos_id` the ids that an example begins and ends with (None: none).
    """

    def __init__(
        self,
        path: paths.Path,
        pieces: dict[str, int],
        markers: dict[str, int],
        bos="",
        eos="",
        processor: dict | None = None,
    ):
        folder = path.parent
        config = _read_json(folder / "tokenizer_config.json")
        self.path = path
        self.vocab = max(pieces.values()) + 1
        self.markers = markers
        self.bos_token = _edge_token(folder, "bos", pieces, bos)
        self.eos_token = _edge_token(folder, "eos", pieces, eos)
        # BOS stands before a text where the folder's own tokenizer writes one: a tokenizer.json says it by its
        # post-processor alone, for a SentencePiece model the settings may say no.
        if processor is None:
            writes_bos = config.get("add_bos_token") is not False
        else:
            writes_bos = _writes(processor, self.bos_token)
        self.bos_id = pieces.get(self.bos_token) if writes_bos else None
        self.eos_id = pieces.get(self.eos_token)
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of plain text; `continues` if it follows other text."""
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """`encode` for many texts, over the library's threads."""
        raise NotImplementedError

    def encode_markup(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """The ids of texts in which markers are tokens, with the span of characters of each id."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        """The text of ids, without markers; `continues` keeps a leading space."""
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`: Llama 1 and 2, TinyLlama, the demo's own base."""

    def __init__(self, path: paths.Path):
        model = path.read_bytes()
        self.words: dict[str, list[int]] = {}  # the ids of those that were met
        try:
            self.fresh = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.continuing = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model: copy tokenizer.model from the base again") from None
        ids = range(self.fresh.vocab_size())
        pieces = {self.fresh.id_to_piece(i): i for i in ids}
        markers = {self.fresh.id_to_piece(i): i for i in ids if self.fresh.is_control(i)}
        decoder = _read_json(path.parent / "tokenizer_config.json").get("added_tokens_decoder", {})
        added = {token["content"]: int(i) for i, token in decoder.items()}  # tokens that a fine-tune added
        added |= _read_json(path.parent / "added_tokens.json")
        bos, eos = (self.fresh.id_to_piece(i) if i >= 0 else "" for i in (self.fresh.bos_id(), self.fresh.eos_id()))
        super().__init__(path, pieces | added, markers | added, bos, eos)
        longest_first = sorted(map(re.escape, self.markers), key=len, reverse=True)
        self.marker = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def encode_batch(self, texts, continues=False):
        if len(texts) >= MANY and self.has_words:
            return self._encode_words(texts if continues else [f" {text}" if text else "" for text in texts])
        return (self.continuing if continues else self.fresh).encode(list(texts))

    @functools.cached_property
    def has_words(self) -> bool:
        """Whether this model encodes each word, with the spaces before it, without regard to the others."""
        pieces = [self.fresh.id_to_piece(i) for i in range(self.fresh.vocab_size())]
        if any(sentencepieces.SPACE in piece.lstrip(sentencepieces.SPACE) for piece in pieces):
            return False
        texts = sentencepieces.telling_texts(pieces)
        return self._encode_words([f" {text}" if text else "" for text in texts]) == self.fresh.encode(texts)

    def _encode_words(self, texts):
        # Most words come again and again: 27 MB of Alpaca take 3.6 CPU seconds by words and 9.2 by texts.
        if len(self.words) > MOST_WORDS:
            self.words.clear()
        known, encoded = self.words, []
        for text in texts:
            ids: list[int] = []
            for word in WORD.findall(text):
                found = known.get(word)
                if found is None:
                    found = known[word] = self.continuing.encode_as_ids(word)
                ids += found
            encoded.append(ids)
        return encoded

    def encode_markup(self, texts):
        return [self._encode_markup(text) for text in texts]

    def _encode_markup(self, text):
        # Text after a marker is a new start, as in Meta's chat code and Hugging Face's conversion.
        ids, offsets, at = [], [], 0
        for part in self.marker.split(text):
            if part in self.markers:
                ids.append(self.markers[part])
                offsets.append((at, at + len(part)))
            elif part:
                encoded = self.fresh.encode(part, out_type="offset_mapping")
                ids += encoded["ids"]
                offsets += [(at + start, at + end) for start, end in encoded["offsets"]]
            at += len(part)
        return ids, offsets

    def decode(self, ids, continues=False):
        known = [int(i) for i in ids if i < self.fresh.vocab_size()]
        return (self.continuing if continues else self.fresh).decode(known)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`: everything newer, through Hugging Face's `tokenizers`."""

    def __init__(self, path: paths.Path, spec: dict | None = None, bos="", eos=""):
        # Files saved after training often truncate and pad; and the post-processor excludes spaces from offsets.
        read = _read_json(path) if spec is None else {}
        processor = None if spec else read.get("post_processor") or {}
        spec = (spec or read) | {"truncation": None, "padding": None, "post_processor": None}
        try:
            self.fresh = tokenizers.Tokenizer.from_str(json.dumps(spec))
            stages = {stage: _without_prefix(spec.get(stage)) for stage in ("normalizer", "pre_tokenizer", "decoder")}
            self.continuing = self.fresh  # mostly the same, and a large one takes a second to build
            if spec | stages != spec:
                self.continuing = tokenizers.Tokenizer.from_str(json.dumps(spec | stages))
            for tokenizer in (self.fresh, self.continuing):
                tokenizer.add_tokens(_declared_tokens(path.parent, tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer ({error}): copy it from the base again") from None
        added = self.fresh.get_added_tokens_decoder().items()
        markers = {token.content: i for i, token in added if token.special}
        super().__init__(path, self.fresh.get_vocab(with_added_tokens=True), markers, bos, eos, processor)

    def encode_batch(self, texts, continues=False):
        tokenizer = self.continuing if continues else self.fresh
        tokenizer.encode_special_tokens = True  # in plain text markers are characters
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_markup(self, texts):
        self.fresh.encode_special_tokens = False
        encodings = self.fresh.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids, continues=False):
        return (self.continuing if continues else self.fresh).decode([int(i) for i in ids], skip_special_tokens=True)


class TiktokenTokenizer(JsonTokenizer):
    """The tiktoken `tokenizer.model` of Meta's Llama 3, converted to a tokenizer.json in memory."""

    def __init__(self, path: paths.Path):
        super().__init__(path, tiktoken.tokenizer_json(tiktoken.read_ranks(path)), tiktoken.BOS, tiktoken.EOS)
        self.chat_template = self.chat_template or tiktoken.CHAT_TEMPLATE


def load_tokenizer(where: paths.PathLike) -> Tokenizer:
    """The tokenizer of a folder, of a name on the hub, or of one file.

    Of both files tokenizer.json is read: Hugging Face reads it, it says how added tokens are split off a text, and in a
    Llama 3's folder the other is a tiktoken file.
    """
    path = hub.tokenizer_folder(where)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            above = path.resolve().parent / "tokenizer.model"  # Meta's Llama 1: one for the folders of all sizes
            remedy = f"add --config.tokenizer={above}" if above.is_file() else "put the base's tokenizer there"
            raise UserError(f"{path} has neither tokenizer.json nor tokenizer.model: {remedy}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: give a base's folder, a tokenizer.json or a tokenizer.model")
    try:
        if path.suffix == ".json":
            return JsonTokenizer(path)
        return TiktokenTokenizer(path) if tiktoken.is_tiktoken(path) else SentencePieceTokenizer(path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # JSON of another structure
        raise UserError(
            f"{path.parent}: the files beside {path.name} (tokenizer_config.json, added_tokens.json, chat_template.jinja …) "
            f"hold something unexpected ({type(error).__name__}: {error}); copy them from the base again"
        ) from None


def write_tokenizer(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Write a tokenizer's files into an existing folder, where transformers then encodes as lowrank does.

    Mostly they are copied. But transformers reads no tiktoken file, and gives other ids and no BOS for a SentencePiece model
    without settings: for these a tokenizer.json and settings are written (if `sentencepieces` can convert the model).
    """
    folder, source = pathlib.Path(folder), tokenizer.path.parent
    beside = {name for name in COMPANIONS if (source / name).is_file()}
    copied = {name: source / name for name in beside if source / name != tokenizer.path}
    spec = None
    if isinstance(tokenizer, TiktokenTokenizer):
        spec = tiktoken.tokenizer_json(tiktoken.read_ranks(tokenizer.path))
    elif isinstance(tokenizer, JsonTokenizer):
        copied["tokenizer.json"] = tokenizer.path
    elif isinstance(tokenizer, SentencePieceTokenizer):
        copied["tokenizer.model"] = tokenizer.path
        if not beside & {"tokenizer.json", "tokenizer_config.json"}:
            spec = sentencepieces.tokenizer_json(tokenizer.fresh, tokenizer.markers)
    for name, path in copied.items():
        (folder / name).write_bytes(path.read_bytes())
    if spec:
        bos = tokenizer.bos_token
        if tokenizer.bos_id is not None:
            bos_first = ([bos, "$A"], [bos, "$A", bos, "$B:1"], [(bos, tokenizer.bos_id)])
            spec["post_processor"] = json.loads(tokenizers.processors.TemplateProcessing(*bos_first).__getstate__())
        unk = spec["model"]["unk_token"]
        named = {"bos_token": bos, "eos_token": tokenizer.eos_token, "unk_token": unk}
        named["chat_template"] = tokenizer.chat_template
        config = {
            # Not LlamaTokenizer, which takes only the vocabulary from a tokenizer.json and splits texts its own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: text for name, text in named.items() if text},
            "add_bos_token": tokenizer.bos_id is not None,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        config = _read_json(source / "tokenizer_config.json") | config  # it may have more, such as a pad token
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_vocab(tokenizer: Tokenizer, vocab: int, where: paths.PathLike) -> None:
    """UserError for ids beyond the embedding's rows, which a gather would silently clamp."""
    if tokenizer.vocab > vocab:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab} tokens but the model's vocabulary has {vocab}: "
            "use the base's own tokenizer"
        )


def _read_json(path: paths.Path) -> dict:
    """The object in a JSON file, or {} without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it from the base again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it from the base again")
    return content


def _edge_token(folder: paths.Path, name: str, pieces: dict[str, int], own: str) -> str:
    """The text of BOS or EOS: from the tokenizer's settings, else `own`, else by the id in the model's config."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        config = _read_json(folder / file)
        if f"{name}_token" in config:
            token = config[f"{name}_token"]
            token = token["content"] if isinstance(token, dict) else token
            if token and token not in pieces:
                raise UserError(f"{folder / file} names {name}_token {token!r}, which the tokenizer does not have")
            return token or ""
    if own:
        return own
    for file in ("generation_config.json", "config.json"):
        number = _read_json(folder / file).get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) else number  # of several EOS the first is trained
        if number is not None:
            return next((text for text, i in pieces.items() if i == number), "")
    return ""


def _writes(processor: dict, token: str) -> bool:
    """Whether the post-processor of a tokenizer.json puts the token before a text."""
    first = [
        step.get("single", [{}])[0].get("SpecialToken", {}).get("id")
        for step in processor.get("processors", [processor])
    ]
    return bool(token) and (token in first or processor.get("cls", [None])[0] == token)


def _declared_tokens(folder: paths.Path, tokenizer: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    """The tokens that only tokenizer_config.json declares; transformers adds them to those of tokenizer.json."""
    config = _read_json(folder / "tokenizer_config.json")
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
    settings = ("single_word", "lstrip", "rstrip", "normalized", "special")
    named = [config.get(f"{name}_token") for name in ("bos", "eos", "pad")]
    texts = {token["content"] if isinstance(token, dict) else token for token in named}
    texts |= {text for text in config.get("additional_special_tokens") or () if isinstance(text, str)}
    tokens = {}
    for _, token in declared:
        options = {name: token[name] for name in settings if name in token}
        options["special"] = bool(options.get("special")) or token["content"] in texts
        tokens[token["content"]] = tokenizers.AddedToken(token["content"], **options)
    for text in sorted(
        text for text in texts if text and text not in tokens and tokenizer.token_to_id(text) is not None
    ):
        tokens[text] = tokenizers.AddedToken(text, special=True)
    return [token for text, token in tokens.items() if text not in known]


def _chat_template(folder: paths.Path, config: dict) -> str | None:
    """The template in chat_template.jinja, else in tokenizer_config.json, as in older folders."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _without_prefix(stage):
    """A stage of a tokenizer.json, without adding or removing a space at the start of the text."""
    match stage:
        case {"type": "Sequence"}:
            return {key: _without_prefix(value) for key, value in stage.items()}
        case list():
            return [kept for kept in map(_without_prefix, stage) if kept is not None]
        case {"type": "Prepend"} | {"type": "Strip", "start": _, "stop": _}:
            return None
        case {"type": "Metaspace"}:
            kept = {key: value for key, value in stage.items() if key != "add_prefix_space"}  # its older name
            return kept | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return stage | {"add_prefix_space": False}
    return stage
