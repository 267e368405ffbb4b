"""Read a config file and the command line's overrides of it.

`ml_collections.config_flags` is not used, because it answers a mistyped key with a traceback, refuses keys that the file
leaves out, and takes `--config.lora.targets=q_proj,v_proj` for one target of that name.
"""

import pathlib
import runpy
import traceback

import ml_collections

from lowrank.cli.run import refuse_unknown
from lowrank.config import Config, Unparsed, from_values, plain, set_key
from lowrank.errors import UserError
from lowrank.files import paths


def read(path: str | None, overrides: list[str]) -> Config:
    """`FILE[:ARG]` and the arguments left on the command line -> the checked config. Raises UserError with all offenders."""
    return from_values(read_values(path, overrides))


def read_values(path: str | None, overrides: list[str]) -> dict:
    """`FILE[:ARG]` and the arguments left on the command line -> nested dicts, not checked yet."""
    if not path:
        raise UserError("--config is missing; say --config=configs/alpaca.py or a config file of your own")
    values = _call_get_config(path)
    for key, text in _override_pairs(overrides):
        set_key(values, key, Unparsed(text))
    return values


def _call_get_config(path: str) -> dict:
    """Nested dicts from the file's `get_config()`; UserError names the line of the file where it fails."""
    file, _, argument = path.partition(":")
    file = str(paths.local(file))
    if not pathlib.Path(file).is_file():
        raise UserError(f"config file {file} is not there; --config takes FILE or FILE:ARGUMENT")
    if not file.endswith(".py"):
        raise UserError(f"config file {file} is no Python file (.py)")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"config file {file} has no get_config(); let it return an ml_collections.ConfigDict")
        config = get_config(argument) if argument else get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"config file {file}: get_config() must return an ml_collections.ConfigDict, not {type(config)}"
            )
        return plain(config)
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"config file {file}" + (f", line {lines[-1]}" if lines else "")
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).splitlines())}") from error


def _override_pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """`--config.KEY=VALUE` or `--config.KEY VALUE` -> (KEY, VALUE); anything else is an unknown argument."""
    pairs, rest = [], list(arguments)
    unknown = []
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name.startswith("config."):
            unknown.append(argument)
        elif equals:
            pairs.append((name.removeprefix("config."), value))
        elif rest and not rest[0].startswith("--"):
            pairs.append((name.removeprefix("config."), rest.pop(0)))
        else:
            raise UserError(f"{argument} has no value; write {argument}=VALUE")
    refuse_unknown(unknown)
    return pairs
