"""A data set of the hub, `org/name[@revision][:config][:split]`: which of its files hold the records.

The data set says it as it does to `datasets`: by the `configs` in its card, else by the names of its files. One that is made by
a script, or has no files that can be read, is taken from the hub's own copy as Parquet (refs/convert/parquet).
Without a config the default one is meant, or the only one; without a split `train`, or the only one.
"""

import collections
import pathlib
import re
from collections.abc import Iterable

from lowrank.errors import UserError
from lowrank.files import hub, paths

NAME = hub.NAME + r"(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]+))?"
CARD, PARQUET = "README.md", "refs/convert/parquet"
ATTRIBUTES = ".gitattributes"  # in every repository: huggingface_hub warns where no file matches
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow")
PACKED = (".gz", ".zst")
NO_RECORDS = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "metadata.json",
)
SPLITS = {  # of a file, by a word in its path
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(SPLITS)})(?=[-._ 0-9/]|$)")
SHARD = re.compile(r"(?:^|/)data/(\w+)-\d{5}-of-\d{5}")
Table = dict[str, dict[str, list[str]]]  # the files of each config's splits


def data_files(where: paths.PathLike | None) -> list[pathlib.Path] | None:
    """The files of records of a data set on the hub, downloaded; None where `where` is no name of one."""
    if not (found := hub.match(where, NAME)):
        return None
    name, revision, config, split = found.groups()
    with hub.hub_errors(name, revision, "dataset"):
        repository = hub.open_repository(name, revision, "dataset", (CARD, ATTRIBUTES))
        table, default = _declared(repository)
        if not table and f"{name.partition('/')[2]}.py" not in repository.files:
            table = {"default": splits} if (splits := _by_name(repository.files)) else {}
        if not table:
            repository, table = _converted(repository)
        return hub.fetch(repository, _choose(str(where), table, default, config, split))


def shown_name(path: paths.Path) -> str:
    """How messages name a file: one of a data set on the hub by its name there, not by its place in the cache."""
    found = re.search(r"/datasets--([^/]+)--([^/]+)/snapshots/[^/]+/(.+)", str(path))
    return f"{found[1]}/{found[2]} ({found[3]})" if found else str(path)


def _declared(repository: hub.Repository) -> tuple[Table, str | None]:
    """The files that the card's `configs` name, and the config that it calls the default."""
    import huggingface_hub
    import yaml

    if CARD not in repository.files:
        return {}, None
    try:
        configs = (huggingface_hub.metadata_load(repository.folder / CARD) or {}).get("configs") or []
        table: Table = {}
        default = None
        for config in configs:
            data, folder = config.get("data_files"), config.get("data_dir", "").strip("./")
            prefix = folder and f"{folder}/"
            inside = {name.removeprefix(prefix): name for name in repository.files if name.startswith(prefix)}
            if data is None:
                splits = _by_name(inside)
            elif isinstance(data, list) and data and isinstance(data[0], dict):
                splits = {str(part["split"]): _matching(part["path"], inside) for part in data}
            else:
                parts = data if isinstance(data, dict) else {"train": data}
                splits = {str(split): _matching(patterns, inside) for split, patterns in parts.items()}
            own = str(config.get("config_name", "default"))
            table[own] = {split: [inside[name] for name in names] for split, names in splits.items()}
            default = own if config.get("default") else default
        return table, default
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"the card of {repository.name} names no data files that can be understood ({what})") from None


def _matching(patterns: str | list[str], names: Iterable[str]) -> list[str]:
    """The names that match any of the patterns, in which `*` stays within a folder and `**` does not."""
    from fsspec.utils import glob_translate

    wanted = [
        glob_translate(pattern.removeprefix("./"))
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    return sorted(name for name in names if any(re.match(pattern, name) for pattern in wanted))


def _by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each split by a word in their paths; without such words all files are `train`."""
    kinds = collections.defaultdict(list)
    for name in sorted(names):
        path = pathlib.PurePath(name)
        bare = path.with_suffix("") if path.suffix in PACKED else path
        if bare.suffix in SUFFIXES and path.name not in NO_RECORDS and not re.search(r"(^|/)[._]", name):
            kinds[bare.suffix.removesuffix("l")].append(name)  # .json and .jsonl are one kind
    splits = collections.defaultdict(list)
    for name in max(kinds.values(), key=len, default=[]):  # the same records may be there in several formats
        shard, words = SHARD.search(name), WORD.findall(name.lower())
        splits[shard[1] if shard else SPLITS[words[-1]] if words else ""].append(name)
    rest = splits.pop("", [])
    return dict(splits) or ({"train": rest} if rest else {})


def _converted(repository: hub.Repository) -> tuple[hub.Repository, Table]:
    """The hub's copy as Parquet: CONFIG/SPLIT/0000.parquet; a split is called partial-SPLIT where the copy is."""
    from huggingface_hub import errors

    try:
        copy = hub.open_repository(repository.name, PARQUET, "dataset", (ATTRIBUTES,))
    except errors.RevisionNotFoundError:
        found = ", ".join(sorted({pathlib.PurePath(name).suffix or name for name in repository.files}))
        raise UserError(
            f"data set {repository.name} has no files of records ({' '.join(SUFFIXES)}), only {found}, and the hub has no copy "
            "of it as Parquet; download and convert it, and give the file"
        ) from None
    table: Table = {}
    for name in sorted(copy.files):
        if name.endswith(".parquet") and name.count("/") == 2:
            config, split, _ = name.split("/")
            table.setdefault(config, {}).setdefault(split, []).append(name)
    return copy, table


def _choose(where: str, table: Table, default: str | None, config: str | None, split: str | None) -> list[str]:
    """The files of a config's split."""
    if config and config not in table and split is None:
        config, split = None, config  # org/name:SPLIT
    if not config:
        config = default or ("default" if "default" in table else next(iter(table)) if len(table) == 1 else None)
    if config not in table:
        said = f"has no config {config}" if config else "has several configs"
        raise UserError(f"data set {where} {said}; say org/name:CONFIG with one of {', '.join(sorted(table))}")
    splits = table[config]
    split = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        others = f"say org/name:{config}:SPLIT with one of {', '.join(splits)}"
        raise UserError(f"data set {where} has no split {split} in its config {config}; {others}")
    if not splits[split]:
        raise UserError(
            f"data set {where}: its card names files for the split {split}, and none of them is there; ask its author"
        )
    return splits[split]
