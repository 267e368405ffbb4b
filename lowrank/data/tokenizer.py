"""Text to token ids and back, with the tokenizer that lies beside a base.

One idea: there are three ways to read a text, and mixing them up is silent. `encode` reads plain text, where
"</s>" is four characters and not the end of an example. With `continues` the text goes on after other text,
so no space is put before it (Llama 1 and 2 put one before the first word). `encode_markup` reads what a chat
template wrote, where "</s>" *is* the token. None of them adds BOS or EOS of its own accord.

`write_tokenizer` puts a tokenizer beside exported weights, in files that transformers reads as lowrank does.
Left out: training a tokenizer.
"""

import json
import pathlib
import re
from collections.abc import Sequence

import sentencepiece
import tokenizers

from lowrank.data import sentencepieces, tiktoken
from lowrank.errors import UserError
from lowrank.files import paths

Offsets = list[tuple[int, int]]  # for each token: its first character, and the one after its last

# Appended to a SentencePiece model this turns `add_dummy_prefix` off: protocol buffers laid end to end are merged,
# and these four bytes say {normalizer_spec: {add_dummy_prefix: false}}. Some releases of the library offer no flag.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# What a tokenizer may consist of beside its tokenizer.json or tokenizer.model.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer:
    """What the rest of lowrank knows of a tokenizer: its subclasses differ in the library that does the work.

    `path` is its file; `vocab` the largest id + 1; `markers` maps the special tokens' text to their ids; `bos_token`
    and `eos_token` are texts, `bos_id` and `eos_id` what an example begins and ends with (None: nothing).
    """

    def __init__(self, path: pathlib.Path, pieces: dict[str, int], markers: dict[str, int], bos="", eos=""):
        folder = path.parent
        config = _read_json(folder / "tokenizer_config.json")
        self.path = path
        self.vocab = max(pieces.values()) + 1
        self.markers = markers
        self.bos_token = _edge_token(folder, "bos", pieces, bos)
        self.eos_token = _edge_token(folder, "eos", pieces, eos)
        # A model with add_bos_token: false (Qwen) never saw BOS before a text; its chat template may still write one.
        self.bos_id = None if config.get("add_bos_token") is False else pieces.get(self.bos_token)
        self.eos_id = pieces.get(self.eos_token)
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of plain text; `continues` if other text stands before it."""
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """`encode` for many texts at once: the libraries spread them over threads."""
        raise NotImplementedError

    def encode_markup(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """The ids of texts in which markers stand for their tokens, with the characters each id came from."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        """The text of ids without the markers; with `continues` a space that leads it is kept."""
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`: Llama 1 and 2, TinyLlama, the demo's own base."""

    def __init__(self, path: pathlib.Path):
        model = path.read_bytes()
        try:
            self.fresh = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.continuing = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model: copy tokenizer.model from the base again") from None
        ids = range(self.fresh.vocab_size())
        pieces = {self.fresh.id_to_piece(i): i for i in ids}
        markers = {self.fresh.id_to_piece(i): i for i in ids if self.fresh.is_control(i)}
        added = _added_tokens(path.parent)  # tokens that a fine-tune put behind SentencePiece's own
        bos, eos = (self.fresh.id_to_piece(i) if i >= 0 else "" for i in (self.fresh.bos_id(), self.fresh.eos_id()))
        super().__init__(path, pieces | added, markers | added, bos, eos)
        longest_first = sorted(map(re.escape, self.markers), key=len, reverse=True)
        self.marker = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def encode_batch(self, texts, continues=False):
        return (self.continuing if continues else self.fresh).encode(list(texts))

    def encode_markup(self, texts):
        return [self._encode_markup(text) for text in texts]

    def _encode_markup(self, text):
        # Text after a marker starts afresh, as in Meta's own chat code and in Hugging Face's conversion.
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

    def __init__(self, path: pathlib.Path):
        self._start(path, _read_json(path))

    def _start(self, path, spec, bos="", eos=""):
        # Files saved after training often cut and pad silently; and the post-processor moves offsets off the spaces.
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        try:
            self.fresh = tokenizers.Tokenizer.from_str(json.dumps(spec))
            stages = {stage: _without_prefix(spec.get(stage)) for stage in ("normalizer", "pre_tokenizer", "decoder")}
            self.continuing = self.fresh  # of most tokenizers the two are one, and a large one takes a second to build
            if spec | stages != spec:
                self.continuing = tokenizers.Tokenizer.from_str(json.dumps(spec | stages))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer ({error}): copy it from the base again") from None
        added = self.fresh.get_added_tokens_decoder().items()
        markers = {token.content: i for i, token in added if token.special}
        super().__init__(path, self.fresh.get_vocab(with_added_tokens=True), markers, bos, eos)

    def encode_batch(self, texts, continues=False):
        tokenizer = self.continuing if continues else self.fresh
        tokenizer.encode_special_tokens = True  # in plain text markers are only characters
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_markup(self, texts):
        self.fresh.encode_special_tokens = False
        encodings = self.fresh.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids, continues=False):
        return (self.continuing if continues else self.fresh).decode([int(i) for i in ids], skip_special_tokens=True)


class TiktokenTokenizer(JsonTokenizer):
    """The tiktoken `tokenizer.model` of Meta's Llama 3, made into a tokenizer.json in memory."""

    def __init__(self, path: pathlib.Path):
        spec = tiktoken.tokenizer_json(tiktoken.read_ranks(path))
        self._start(path, spec, tiktoken.BOS, tiktoken.EOS)
        self.chat_template = self.chat_template or tiktoken.CHAT_TEMPLATE


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer in a folder, or of one file.

    With both files there, tokenizer.json is read: it is the one that Hugging Face and so every peer reads, it says
    itself how tokens added later are cut out of a text, and beside a Llama 3's the other is a tiktoken file.
    """
    path = paths.path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            above = path.resolve().parent / "tokenizer.model"  # Meta's first Llama: one for all the sizes' folders
            remedy = f"add --config.tokenizer={above}" if above.is_file() else "put the base's tokenizer there"
            raise UserError(f"{path} has neither tokenizer.json nor tokenizer.model: {remedy}")
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist: name the base's folder, a tokenizer.json or a tokenizer.model"
        )
    kind = JsonTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    kind = TiktokenTokenizer if kind is SentencePieceTokenizer and tiktoken.is_tiktoken(path) else kind
    try:
        return kind(path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # of files that are JSON, but not as expected
        raise UserError(
            f"{path.parent}: the files beside {path.name} (tokenizer_config.json, added_tokens.json, chat_template.jinja …) "
            f"hold something unexpected ({type(error).__name__}: {error}); copy them from the base again"
        ) from None


def write_tokenizer(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Put a tokenizer's files into an existing folder, so that transformers reads the same ids there as lowrank.

    Mostly these are the files beside it, as they are. But transformers does not read a tiktoken file, and of a
    SentencePiece model alone, with no settings, it makes other ids and no BOS: a tokenizer.json and settings are written.
    (Not of the rare model that `sentencepieces` cannot convert: that one is copied.)
    """
    folder, source = pathlib.Path(folder), tokenizer.path.parent
    is_json, is_tiktoken = type(tokenizer) is JsonTokenizer, type(tokenizer) is TiktokenTokenizer
    spec = None
    if is_tiktoken:
        spec = tiktoken.tokenizer_json(tiktoken.read_ranks(tokenizer.path))
    elif not is_json and not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        spec = sentencepieces.tokenizer_json(tokenizer.fresh, tokenizer.markers)

    for name in COMPANIONS:
        if (source / name).is_file() and source / name != tokenizer.path:
            (folder / name).write_bytes((source / name).read_bytes())
    if not is_tiktoken:
        (folder / ("tokenizer.json" if is_json else "tokenizer.model")).write_bytes(tokenizer.path.read_bytes())
    if spec:
        spec["post_processor"] = _bos_first(tokenizer)
        unk = spec["model"]["unk_token"]
        named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "unk_token": unk}
        config = {
            # Not LlamaTokenizer: of a tokenizer.json that takes the vocabulary and builds its own splitting around it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in named.items() if token},
            "add_bos_token": tokenizer.bos_id is not None,
            "clean_up_tokenization_spaces": False,
        }
        if tokenizer.chat_template:
            config["chat_template"] = tokenizer.chat_template
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        config = _read_json(source / "tokenizer_config.json") | config  # which may know more, a pad token for one
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bos_first(tokenizer: Tokenizer) -> dict | None:
    """The stage of a tokenizer.json that puts BOS before each text, where the tokenizer has one."""
    if tokenizer.bos_id is None:
        return None
    bos = {"SpecialToken": {"id": tokenizer.bos_token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    known = {"id": tokenizer.bos_token, "ids": [tokenizer.bos_id], "tokens": [tokenizer.bos_token]}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {tokenizer.bos_token: known},
    }


def check_vocab(tokenizer: Tokenizer, vocab: int, where: str | pathlib.Path) -> None:
    """Refuse a tokenizer whose ids do not all have a row in the embedding (a gather would clamp them silently)."""
    if tokenizer.vocab > vocab:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab} tokens but the model's vocabulary has {vocab}: "
            "use the tokenizer that belongs to this base"
        )


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it from the base again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it from the base again")
    return content


def _edge_token(folder: pathlib.Path, name: str, pieces: dict[str, int], own: str) -> str:
    """The text of BOS or EOS: as the tokenizer's settings name it, else `own`, else by the id in the model's config."""
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
        number = number[0] if isinstance(number, list) else number  # several EOS: the first is the one to train
        if number is not None:
            return next((text for text, i in pieces.items() if i == number), "")
    return ""


def _chat_template(folder: pathlib.Path, config: dict) -> str | None:
    """chat_template.jinja goes before the tokenizer_config.json that older folders keep it in."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _added_tokens(folder: pathlib.Path) -> dict[str, int]:
    """Tokens named beside a tokenizer.model: {text: id}."""
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    added = {token["content"]: int(i) for i, token in decoder.items()}
    return added | _read_json(folder / "added_tokens.json")


def _without_prefix(stage):
    """A stage of a tokenizer.json that neither puts a space before the text nor takes one away from it."""
    match stage:
        case {"type": "Sequence"}:
            return {key: _without_prefix(value) for key, value in stage.items()}
        case list():
            return [kept for kept in map(_without_prefix, stage) if kept is not None]
        case {"type": "Prepend"} | {"type": "Strip", "start": _, "stop": _}:
            return None
        case {"type": "Metaspace"}:
            kept = {key: value for key, value in stage.items() if key != "add_prefix_space"}  # its older spelling
            return kept | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return stage | {"add_prefix_space": False}
    return stage
