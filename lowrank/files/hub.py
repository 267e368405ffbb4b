"""Repositories of the Hugging Face hub: `org/name` or `org/name@revision` in place of a folder, and the upload of an export.

One idea: a name becomes a folder of the hub's cache before anything is read, so no reader knows of the hub. A file or folder of
that name on the disk wins. Cache, token and offline mode are huggingface_hub's (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE); only files
that are read are fetched, complete ones once. Every host of a run downloads into its own cache; where hosts then have
different commits, the comparison of their inputs says so.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.formatting import format_bytes
from lowrank.parallel import distributed

NAME = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
NO_NAMES = tuple(".arrow .bin .csv .gguf .gz .json .jsonl .parquet .pt .pth .py .safetensors .tsv .txt .zst".split())
TOKENIZER = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
CONFIG, META_CONFIG = "config.json", "params.json"
SETTINGS = (CONFIG, META_CONFIG, "generation_config.json", *TOKENIZER)
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository at a commit. `folder`, in the cache, holds those of its files that were fetched."""

    name: str
    kind: str  # "model" | "dataset"
    commit: str
    folder: pathlib.Path
    files: Mapping[str, int]  # the size in bytes of every file, by its name


def match(where: paths.PathLike | None, pattern: str = NAME) -> re.Match | None:
    """The parts of a name on the hub; None for anything that is here, or can only be a path."""
    found = re.fullmatch(pattern, where, re.ASCII) if isinstance(where, str) else None
    is_file = found and not found["revision"] and found["name"].endswith(NO_NAMES)
    return None if not found or is_file or pathlib.Path(found[0]).exists() else found


def base_folder(where: paths.PathLike, weights: bool = True) -> paths.Path:
    """The folder of a base, downloaded where `where` is a name on the hub; without `weights`, only its config.json."""
    return _folder(where, SETTINGS if weights else (CONFIG,), _weights if weights else _config)


def tokenizer_folder(where: paths.PathLike) -> paths.Path:
    """The folder of a tokenizer, downloaded where `where` is a name on the hub."""
    return _folder(where, TOKENIZER, lambda repository: [])


def adapter_folder(where: paths.PathLike) -> paths.Path:
    """The folder of an adapter, downloaded where `where` is a name on the hub."""
    return _folder(where, (ADAPTER,), _adapter)


def _folder(where: paths.PathLike, settings: tuple[str, ...], choose: Callable[[Repository], list[str]]) -> paths.Path:
    if not (found := match(where)):
        return paths.path(where)
    name, revision = found.groups()
    with hub_errors(name, revision):
        repository = open_repository(name, revision, "model", settings)
        fetch(repository, choose(repository))
        return repository.folder


def _adapter(repository: Repository) -> list[str]:
    if ADAPTER not in repository.files:
        remedy = "give it as the base" if CONFIG in repository.files else "give the name of one"
        raise UserError(f"{repository.name} on the hub is no adapter: it has no {ADAPTER}; {remedy}")
    return [name for name in ADAPTER_WEIGHTS if name in repository.files][:1]


def _config(repository: Repository) -> list[str]:
    if CONFIG not in repository.files:
        what = "it is an adapter" if ADAPTER in repository.files else f"it has no {CONFIG}{_others(repository)}"
        raise UserError(f"{repository.name} on the hub is no base: {what}; give the name of a base")
    return []


def _weights(repository: Repository) -> list[str]:
    """The files of weights, in one format: safetensors, else PyTorch's, else Meta's."""
    for single, index in WEIGHTS:
        if single in repository.files:
            return [*_config(repository), single]
        if index in repository.files:
            content = fetch(repository, [index])[0].read_bytes().decode(errors="replace")
            # Parsed, and checked, by the reader; it also names a shard that is missing.
            return _config(repository) + sorted({*re.findall(r':\s*"([^"]+)"', content)} & repository.files.keys())
    if META_CONFIG in repository.files:
        return [name for name in repository.files if re.fullmatch(r"consolidated[^/]*\.pth", name)]
    _config(repository)
    what = f"no weights as safetensors or .bin{_others(repository)}"
    raise UserError(f"{repository.name} on the hub has {what}; give another base")


def _others(repository: Repository) -> str:
    found = {pathlib.PurePath(name).suffix for name in repository.files} & {".gguf", ".onnx", ".pt", ".pth", ".h5"}
    return f" (there is {', '.join(sorted(found))})" if found else ""


# ---- Downloading -----------------------------------------------------------------------------------------------------


@functools.cache  # a process sees one commit of a revision
def open_repository(name: str, revision: str | None, kind: str, settings: tuple[str, ...]) -> Repository:
    """Find the revision's commit, list its files, and fetch those of `settings` that are there: small ones.

    The list is kept in the cache too, so that without the hub nobody takes a part for the whole.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):  # most often everything is in the cache
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})

    options = {"repo_type": kind, "local_files_only": constants.HF_HUB_OFFLINE}
    at = huggingface_hub.HfApi().resolve_revision(name, revision=revision, **options)
    options |= {"revision": at, "allow_patterns": list(settings), "tqdm_class": Quiet}
    folder = pathlib.Path(huggingface_hub.snapshot_download(name, **options))
    try:
        listed = huggingface_hub.get_cached_repo_tree(name, repo_type=kind, revision=at.resolved)
        files = {file.path: file.size for file in listed}
    except errors.CachedRepoTreeNotFoundError:  # fetched by another program, and the hub is out of reach
        files = {
            file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
        }
    return Repository(name, kind, at.resolved, folder, files)


def fetch(repository: Repository, names: Iterable[str]) -> list[pathlib.Path]:
    """The files in the cache, those that are missing downloaded: one after the other, so that Ctrl-C ends it at once."""
    import huggingface_hub

    places = {name: repository.folder / name for name in names}
    missing = [name for name, place in places.items() if not place.exists()]
    if missing and distributed.is_first():
        size = format_bytes(sum(repository.files[name] for name in missing))
        what = ", ".join(missing) if len(missing) < 4 else f"{len(missing)} files"
        print(f"downloading {size} of {repository.name}: {what}", file=sys.stderr, flush=True)
    for name in missing:
        huggingface_hub.hf_hub_download(repository.name, name, repo_type=repository.kind, revision=repository.commit)
    return list(places.values())


# ---- Uploading -------------------------------------------------------------------------------------------------------


def create(to: str) -> None:
    """Make the repository `to`, private, and its branch, where they do not exist. UserError if this account may not."""
    import huggingface_hub

    if not (found := re.fullmatch(NAME, to, re.ASCII)):
        raise UserError(f"{to} is no name on the hub to upload to; say org/name, or org/name@branch")
    name, branch = found.groups()
    with hub_errors(name):
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)


def push(folder: pathlib.Path, to: str, others: Mapping[str, paths.Path]) -> str:
    """Upload a folder's files, and others under the names given, in one commit -> its address."""
    import huggingface_hub

    name, _, branch = to.partition("@")
    files: dict = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files |= {where: file.read_bytes() for where, file in others.items()}
    with hub_errors(name, branch):
        additions = [huggingface_hub.CommitOperationAdd(where, content) for where, content in files.items()]
        message = "Upload an export of lowrank"
        done = huggingface_hub.HfApi().create_commit(name, additions, commit_message=message, revision=branch or None)
        open_repository.cache_clear()
        return done.commit_url


# ---- Errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turn errors of the hub, the network and the cache into a UserError."""
    try:
        yield
    except Exception as error:
        line = explain(error, name, revision, kind)
        if line is None:
            raise
        raise UserError(line) from error


def explain(error: Exception, name: str, revision: str | None, kind: str) -> str | None:
    """What went wrong with a repository, in one line with what to do; None for an error that is none of the hub's."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    said = " ".join((getattr(error, "server_message", None) or _cause(error)).split())
    out_of_reach = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, errors.OfflineModeIsEnabled)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated, and this account may not read it yet; accept its licence at {page} and {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{'data set' if kind == 'dataset' else 'model'} of that name on {host} that this account may read"
        return f"{name} is no file or folder here, and there is no {what}; correct the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'}; give another after @, one that {page}/tree/main lists"
    if status in (401, 403):
        return f"{host} does not allow that with {name} ({said}); {LOGIN} of an account that may"
    if isinstance(error, out_of_reach) and constants.HF_HUB_OFFLINE:
        where = f"here and not, or not whole, in the cache {constants.HF_HUB_CACHE}"
        return f"{name} is no file or folder {where}, and HF_HUB_OFFLINE forbids to download; run once without it"
    if isinstance(error, out_of_reach):
        what = f"{host} cannot be reached ({said})"
        return f"{name} is no file or folder here or in the cache, and {what}; check the network and the name"
    if status >= 500:
        return (
            f"{host} cannot serve {name} now ({said}); run the same command again later, files that are complete stay"
        )
    if status or isinstance(error, ValueError):
        return f"{host} refuses {name} ({said}); correct it"
    if isinstance(error, errors.HTTPError) or (isinstance(error, OSError) and error.errno is None):
        return f"the transfer of {name} broke off ({said}); run the same command again, files that are complete stay"
    if isinstance(error, OSError):
        return f"{name} cannot be kept in the cache {constants.HF_HUB_CACHE} ({error}); free space, or set HF_HOME"
    return None


def _cause(error: BaseException) -> str:
    """What the error says, or for one of the network the first line of the error that caused it all."""
    while error.__cause__ and not isinstance(error, ValueError):
        error = error.__cause__
    text = str(error).strip()
    return (text if isinstance(error, ValueError) else text.partition("\n")[0]) or type(error).__name__
