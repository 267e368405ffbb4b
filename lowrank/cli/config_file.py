"""A config's file and what the command line says instead: read, and handed to config.py to be checked.

Overrides are read here and not by `ml_collections.config_flags`, which answers a mistyped key with a traceback, refuses
keys that the file leaves out, and turns `--config.lora.targets=q_proj,v_proj` into one target of that name.
"""

import importlib.util
import pathlib

import ml_collections

from lowrank.config import Config, Text, checked, set_key
from lowrank.errors import UserError


def read(path: str | None, overrides: list[str]) -> Config:
    """`FILE[:ARG]` and the arguments left on the command line -> the checked config. Raises UserError with all offenders."""
    values = read_values(path, overrides)
    if values.pop("sweep", None):
        raise UserError(
            "config.sweep is set, but this command runs one member only; use python -m lowrank.sweep, or remove it"
        )
    return checked(values)


def read_values(path: str | None, overrides: list[str]) -> dict:
    """`FILE[:ARG]` and the arguments left on the command line -> nested dicts, not checked yet."""
    if not path:
        raise UserError("--config is missing; say --config=configs/alpaca.py or a config file of your own")
    values = _call_get_config(path)
    for key, text in _override_pairs(overrides):
        set_key(values, key, Text(text))
    return values


def _call_get_config(path: str) -> dict:
    file, _, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(f"config file {file} is not there; --config takes FILE or FILE:ARGUMENT")
    module_spec = importlib.util.spec_from_file_location(f"lowrank_config_{pathlib.Path(file).stem}", file)
    if module_spec is None:
        raise UserError(f"config file {file} is no Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"config file {file} has no get_config(); let it return an ml_collections.ConfigDict")
        config = module.get_config(argument) if argument else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"config file {file}: get_config() must return an ml_collections.ConfigDict, not {type(config)}"
            )
        return _plain(config)
    except UserError:
        raise
    except Exception as error:
        lines = [frame.tb_lineno for frame in _frames(error.__traceback__) if frame.tb_frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"config file {file}" + (f", line {lines[0]}" if lines else "")
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).splitlines())}") from error


def _frames(traceback):
    """Innermost first."""
    frames = []
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    return reversed(frames)


def _plain(config: ml_collections.ConfigDict) -> dict:
    values = {key: config[key] for key in config}  # `to_dict` would turn tuples of a sweep into lists
    return {
        key: _plain(value) if isinstance(value, ml_collections.ConfigDict) else value for key, value in values.items()
    }


def _override_pairs(arguments: list[str]) -> list[tuple[str, str]]:
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
    if unknown:
        raise UserError(f"unknown argument{'s' * (len(unknown) > 1)} {' '.join(unknown)}; see --help")
    return pairs
