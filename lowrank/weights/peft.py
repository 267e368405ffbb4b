"""Read and write adapters in PEFT's format, and read those of mlx-lm.

PEFT stores an adapter module by module: `lora_A` [rank, in] and `lora_B` [out, rank] are the transposes of our lora_a and
lora_b. Its settings choose modules, ranks and alphas by lists, regexes and patterns over module names. Here they are
evaluated for every module of the base, which gives one table of ranks and alphas; factors of a smaller rank than their
target's largest are padded with zeros. mlx-lm's settings become PEFT's; its factors lie as ours do.

Left out, and refused by name: DoRA, adapters on embeddings and the head, biases and modules saved whole (unless they are
the base's own), and initial weights that were taken out of the base.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.errors import UserError
from lowrank.families.tensor_names import group_layers
from lowrank.files import paths
from lowrank.files.new_folder import new_folder
from lowrank.weights.base import Base, StoredLeaf
from lowrank.weights.huggingface import open_file
from lowrank.weights.tensor_file import Tensor, cut

CONFIG, TENSORS, TENSORS_BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSORS_MLX = "adapters.safetensors"
KEY = "base_model.model.{module}.lora_{factor}.weight"
KEY_MLX = "{module}.lora_{factor}"  # lora_a [in, rank], lora_b [rank, out]
KEY_PATTERN = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d{1,3})\.")  # a longer number means a damaged key
BIAS_PATTERN = re.compile(r"base_model\.model\.model\.layers\.(\d{1,3})\.(\w+)\.(\w+)\.(?:base_layer\.)?bias")
# What PEFT saves along where the vocabulary was resized, or as modules_to_save, often unchanged.
SAVED_ALONG = {
    "embed_tokens": "base_model.model.model.embed_tokens.weight",
    "lm_head": "base_model.model.lm_head.weight",
}
BLOCKS = {target: "self_attn" if target in TARGETS[:4] else "mlp" for target in TARGETS}

# Other fields and their supported values; every field that is not named here must be off (null, false, empty).
SUPPORTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", "all", "lora_only"),  # the tensors tell whether one was trained
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # other ways may have changed the base
}
HARMLESS = (
    *("inference_mode", "revision", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"),
    "runtime_config",  # PEFT ignores it in files too
    "fan_in_fan_out",  # of GPT-2's layers: PEFT turns it off where a layer is linear, as all of ours are
)


def _compiles(pattern: str) -> bool:
    """Whether the text is a valid regex inside the one that PEFT puts around patterns."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _is_choice(value: Any) -> bool:
    """A list of names or a regex."""
    return _compiles(value) if isinstance(value, str) else _is_list_of(str, value)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_table(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_compiles(pattern) and valid(value[pattern]) for pattern in value)


UNDERSTOOD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "lora_dropout": (lambda v: type(v) in (int, float) and 0 <= v < 1, "from 0 up to, not including, 1"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "modules_to_save": (
        lambda v: _is_list_of(str, v) and {*v} <= {*SAVED_ALONG},
        "supported: embed_tokens and lm_head can be saved whole, where they are the base's own",
    ),
    "base_model_name_or_path": (lambda v: isinstance(v, str), "a name or a path"),
    "target_modules": (lambda v: bool(v) and _is_choice(v), "a list of names or a regex"),
    "exclude_modules": (_is_choice, "a list of names or a regex"),
    "layers_to_transform": (lambda v: type(v) is int or _is_list_of(int, v), "a layer or a list of them"),
    "layers_pattern": (
        lambda v: _is_choice(v) and all(map(_compiles, [v] if isinstance(v, str) else v)),
        "a name or a list of them",
    ),
    "rank_pattern": (lambda v: _is_table(v, _is_rank), "a table from patterns to ranks"),
    "alpha_pattern": (lambda v: _is_table(v, _is_alpha), "a table from patterns to alphas"),
}

Modules = dict[tuple[str, int], tuple[int, float]]  # (target, layer) -> (rank, alpha), where there is an adapter


def module_name(target: str, layer: int | str) -> str:
    """PEFT's name of a projection."""
    return f"model.layers.{layer}.{BLOCKS[target]}.{target}"


def read_peft(
    where: paths.PathLike, layers: int | None = None, base: Base | None = None
) -> tuple[dict, LoraConfig, str | None]:
    """A PEFT folder, or one of mlx-lm -> (the `lora` tree in float32 NumPy arrays, its LoraConfig, the base's name).

    `layers` is the base's number of layers; None: that of `base`, else the largest layer that the tensors name. Embeddings
    and a head that are saved along are compared with those of `base`, and refused where they differ or there is none.
    """
    folder = paths.path(where)
    settings = _read_json(folder / CONFIG)
    mlx = "fine_tune_type" in settings or "lora_parameters" in settings
    names = (TENSORS_MLX,) if mlx else (TENSORS, TENSORS_BIN)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    fields = _mlx_fields(settings, folder / CONFIG) if mlx else _check_fields(settings, folder / CONFIG)
    if file is None:
        lacks = (
            f"is an adapter of mlx-lm without its {TENSORS_MLX}" if mlx else f"has neither {TENSORS} nor {TENSORS_BIN}"
        )
        raise UserError(f"{folder}: {lacks}; fetch or export the adapter again")
    problems: list[str] = []
    tensors = open_file(file, problems)
    for name in [name for name in tensors if re.search(r"\.lora_[AB]\.default\.weight$", name)]:
        plain = name.replace(".default.", ".")  # trainers that save a state dict leave the adapter's name in it
        problems += [f"{plain} is there twice, also as {name}"] if plain in tensors else []
        tensors[plain] = tensors.pop(name)
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; fetch the adapter again")
    layers = layers or (base.config.layers if base else _count_layers(tensors))
    if mlx:
        fields["target_modules"] = _mlx_modules(settings, tensors, layers)
    else:
        problems += _saved_along(fields, tensors, base)
    modules = _modules(fields, layers, problems)
    factors = _factors(tensors, modules, problems, mlx)
    if problems:
        of = f" (an adapter of {fields['base_model_name_or_path']})" if fields.get("base_model_name_or_path") else ""
        raise UserError(f"{file}{of}: {'; '.join(problems)}; give the base it belongs to, or fetch the adapter again")
    config = _config(fields, modules, layers)
    return _stacked(factors, config, layers), config, fields.get("base_model_name_or_path")


def _count_layers(tensors: dict[str, Tensor]) -> int:
    return 1 + max((int(match[1]) for match in map(KEY_PATTERN.match, tensors) if match), default=0)


def _saved_along(fields: dict[str, Any], tensors: dict[str, Tensor], base: Base | None) -> list[str]:
    """Take embeddings and head out of the tensors -> what is wrong with those that are not the base's own."""
    problems = []
    for name, key in SAVED_ALONG.items():
        if key not in tensors:
            promised = name in (fields.get("modules_to_save") or ())
            problems += [f"missing: {key}, which modules_to_save promises"] if promised else []
            continue
        saved = tensors.pop(key)
        if base is None:
            problems.append(f"{key} is saved whole, and only the base tells whether it is its own")
            continue
        is_kernel = name == "lm_head" and "lm_head" in base.params  # a tied head is the embedding
        leaf = base.params["lm_head"]["kernel"] if is_kernel else base.params["embed_tokens"]["embedding"]
        own = leaf.shape[::-1] if is_kernel else leaf.shape
        if saved.shape != own:
            problems.append(f"{key} is {list(saved.shape)} and the base's own {list(own)}: another vocabulary")
        elif not _is_same(saved, leaf, is_kernel):
            problems.append(f"{key} is saved whole and is not the base's own: it was trained, which is not supported")
    trained = []
    projections = base.params["layers"] if base else {}
    biases = {key: match for key in tensors if (match := BIAS_PATTERN.fullmatch(key))}
    for key, match in biases.items():
        layer, block, target = match.groups()
        leaf = projections.get(block, {}).get(target, {}).get("bias")
        is_known = leaf is not None and int(layer) < leaf.shape[0]
        if is_known and not _are_equal(tensors.pop(key).whole(), leaf[int(layer)]):
            trained.append(key)
    return problems + ([f"{group_layers(trained)} was trained, which is not supported"] if trained else [])


def _is_same(tensor: Tensor, leaf: StoredLeaf, is_kernel: bool) -> bool:
    """Whether a matrix is a leaf of the base, as far as the coarser of their dtypes tells; read in bands of rows."""
    rows, columns = tensor.shape
    for band in cut(slice(0, rows), 4096):
        saved = tensor.read((band, slice(0, columns)))
        index = (slice(0, columns), band) if is_kernel else (band, slice(0, columns))
        own = leaf.read(index, leaf.dtype).T if is_kernel else leaf.read(index, leaf.dtype)
        if not _are_equal(saved, own):
            return False
    return True


def _are_equal(saved: np.ndarray, own: np.ndarray) -> bool:
    return np.array_equal(saved, own.astype(saved.dtype)) or np.array_equal(saved.astype(own.dtype), own)


# ---- mlx-lm: a free scale instead of an alpha, and the last layers instead of patterns

UNDERSTOOD_MLX: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (_is_rank, "a positive integer"),
    "scale": (_is_alpha, "a positive number"),
    "dropout": (lambda v: type(v) in (int, float) and 0 <= v < 1, "from 0 up to, not including, 1"),
    "keys": (lambda v: _is_list_of(str, v), "a list of names"),
}


def _mlx_fields(settings: dict[str, Any], path: paths.Path) -> dict[str, Any]:
    """mlx-lm's settings in PEFT's words, without the modules; the others are of its training. UserError lists all offenders."""
    found, kind = settings.get("lora_parameters"), settings.get("fine_tune_type", "lora")
    problems = [] if kind == "lora" else [f"fine_tune_type = {json.dumps(kind)} is not supported"]
    if not isinstance(found, dict):
        found, problems = {}, [*problems, f"lora_parameters = {json.dumps(found)} is not an object"]
    elif "alpha" in found:  # of 2024: some releases multiply by alpha / rank, later ones ignore it
        problems.append("lora_parameters.alpha belongs to releases whose scale means something else")
    for name in ("rank", "scale"):
        problems += [f"lora_parameters.{name} is missing"] if found and found.get(name) is None else []
    for name, (valid, wanted) in UNDERSTOOD_MLX.items():
        if found.get(name) is not None and not valid(found[name]):
            problems.append(f"lora_parameters.{name} = {json.dumps(found[name])} is not {wanted}")
    if type(settings.get("num_layers")) is not int:
        problems.append("num_layers is missing" if settings.get("num_layers") is None else "num_layers is no integer")
    if problems:
        raise UserError(f"{path}, of mlx-lm: {'; '.join(problems)}; give an adapter that does without")
    made_for = settings.get("model")
    fields = {"r": found["rank"], "lora_alpha": found["scale"] * found["rank"], "lora_dropout": found.get("dropout")}
    return fields | {"base_model_name_or_path": made_for if isinstance(made_for, str) else None}


def _mlx_modules(settings: dict[str, Any], tensors: dict[str, Tensor], layers: int) -> list[str]:
    """The modules that mlx-lm adapts: those of `keys` in the last layers. Without `keys` its releases differ: all that the
    file has."""
    count, keys = settings["num_layers"], settings["lora_parameters"].get("keys")
    here = [target for target in TARGETS if any(f".{target}.lora_" in name for name in tensors)]
    targets = here if keys is None else [target for target in TARGETS if f"{BLOCKS[target]}.{target}" in keys]
    first = max(layers - count, 0) if count > 0 else 0
    return [module_name(target, layer) for target in targets for layer in range(first, layers)]


def _modules(fields: dict[str, Any], layers: int, problems: list[str]) -> Modules:
    """Rank and alpha of every module that carries an adapter."""
    modules = {}
    for target in TARGETS:
        for layer in range(layers):
            name = module_name(target, layer)
            if is_target(fields, name):
                rank = _of_pattern(fields.get("rank_pattern"), name, fields["r"])
                alpha = _of_pattern(fields.get("alpha_pattern"), name, fields["lora_alpha"])
                modules[target, layer] = rank, float(alpha)
    tables = [name for name in ("model.embed_tokens", "lm_head") if is_target(fields, name)]
    if tables and not _is_all_linear(fields["target_modules"]):  # all-linear leaves them out
        problems.append(f"target_modules puts adapters on {' and '.join(tables)}, which is not supported")
    if not modules:
        problems.append(f"target_modules = {json.dumps(fields['target_modules'])} matches no projection of a Llama")
    return modules


def is_target(fields: dict[str, Any], name: str) -> bool:
    """Whether a module carries an adapter: PEFT's `check_target_module_exists` and its shorthand for all linear layers."""
    wanted, excluded = fields["target_modules"], fields.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _is_named(excluded, name):
        return False
    if isinstance(wanted, str):
        return _is_all_linear(wanted) or re.fullmatch(wanted, name) is not None
    # A full name overrides the settings for layers.
    return name in wanted or (_is_named(wanted, name) and _in_chosen_layer(fields, name))


def _is_all_linear(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def _is_named(names: list[str], name: str) -> bool:
    return any(f".{name}".endswith(f".{suffix}") for suffix in names)


def _in_chosen_layer(fields: dict[str, Any], name: str) -> bool:
    chosen, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    if chosen is None or chosen == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    regexes = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next(filter(None, (re.match(regex, name) for regex in regexes)), None)
    return match is not None and int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _of_pattern(patterns: dict[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches, as PEFT's `get_pattern_key`."""
    hits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(hits, otherwise)


def _factors(
    tensors: dict[str, Tensor], modules: Modules, problems: list[str], mlx: bool
) -> dict[tuple[str, int], list]:
    """(target, layer) -> [lora_a [in, rank], lora_b [rank, out]]; missing, misshapen or infinite ones join `problems`."""
    form, letters = (KEY_MLX, "ab") if mlx else (KEY, "AB")
    wanted = {(at, letter): form.format(module=module_name(*at), factor=letter) for at in modules for letter in letters}
    unknown = sorted(tensors.keys() - set(wanted.values()))
    missing = [key for key in wanted.values() if key not in tensors]
    if unknown and len(missing) == len(wanted):
        target, _ = next(iter(modules), (TARGETS[0], 0))
        such = form.format(module=module_name(target, "*"), factor=letters[0])
        problems.append(f"no tensor has a name that target_modules stands for (such as {such})")
    elif missing:
        problems.append(f"missing: {group_layers(missing)}")
    if unknown:
        problems.append(f"unknown: {group_layers(unknown)}")
    factors: dict = {}
    odd: dict[str, list[str]] = {}
    infinite = []
    for (place, factor), key in wanted.items():
        if key in tensors:
            shape, rank = tensors[key].shape, modules[place][0]
            if len(shape) != 2 or shape[factor in "Ba"] != rank:
                odd.setdefault(f"{list(shape)}, which does not fit a rank of {rank}", []).append(key)
                continue
            array = tensors[key].whole()
            array = np.ascontiguousarray(array if mlx else array.T, np.float32)
            if not np.isfinite(array).all():
                infinite.append(key)
            factors.setdefault(place, []).append(array)
    problems += [f"{group_layers(keys)} is {shape}" for shape, keys in odd.items()]
    if infinite:
        problems.append(f"infinite or undefined values in {group_layers(infinite)}")
    if not problems:
        for target in {target for target, _ in factors}:
            sizes = {(a.shape[0], b.shape[1]) for (own, _), (a, b) in factors.items() if own == target}
            if len(sizes) > 1:
                problems.append(f"{target} has different sizes [in, out] in different layers: {sorted(sizes)}")
    return factors


def _config(fields: dict[str, Any], modules: Modules, layers: int) -> LoraConfig:
    """The shortest LoraConfig: `ranks` and `alphas` only for targets with other values than the one rank and alpha."""
    targets = tuple(target for target in TARGETS if any(own == target for own, _ in modules))
    pairs = {modules.get((target, layer), (0, 0.0)) for target in targets for layer in range(layers)}
    rank, alpha = pairs.pop() if len(pairs) == 1 else (fields["r"], float(fields["lora_alpha"]))
    table = {target: [modules.get((target, layer), (0, alpha)) for layer in range(layers)] for target in targets}
    ranks = ((target, tuple(rank for rank, _ in table[target])) for target in targets)
    alphas = ((target, tuple(alpha for _, alpha in table[target])) for target in targets)
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=fields.get("lora_dropout") or 0.0,
        targets=targets,
        scaling="rslora" if fields.get("use_rslora") else "standard",
        ranks=tuple(entry for entry in ranks if set(entry[1]) != {rank}),
        alphas=tuple(entry for entry in alphas if set(entry[1]) != {alpha}),
    )


def _stacked(factors: dict[tuple[str, int], list], config: LoraConfig, layers: int) -> dict:
    """The `lora` tree: layers stacked, each factor padded with zeros to its target's largest rank."""
    lora: dict = {"layers": {}}
    for target in config.targets:
        a, b = next(pair for (own, _), pair in factors.items() if own == target)
        width = config.width(target)
        lora_a = np.zeros((layers, a.shape[0], width), np.float32)
        lora_b = np.zeros((layers, width, b.shape[1]), np.float32)
        for layer in range(layers):
            if (target, layer) in factors:
                a, b = factors[target, layer]
                lora_a[layer, :, : a.shape[1]], lora_b[layer, : b.shape[0]] = a, b
        lora["layers"].setdefault(BLOCKS[target], {})[target] = {"lora_a": lora_a, "lora_b": lora_b}
    return lora


def _read_json(path: paths.Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.items()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as PEFT's settings ({error}); give a PEFT folder") from None
    return fields


def _check_fields(fields: dict[str, Any], path: paths.Path) -> dict[str, Any]:
    """PEFT's settings, each understood, harmless or off. UserError lists all that are not."""
    if (kind := fields.get("peft_type")) not in (None, "LORA"):  # its other fields are another method's
        said = f"{path}: peft_type = {json.dumps(kind)} is not supported, it is another method than LoRA"
        raise UserError(f'{said}; give an adapter whose peft_type is "LORA"')
    problems = [
        f"{name} = {json.dumps(value)} is not supported"
        for name, value in fields.items()
        if name not in {*UNDERSTOOD, *HARMLESS} and (value not in SUPPORTED[name] if name in SUPPORTED else value)
    ]
    required = ("peft_type", "r", "lora_alpha", "target_modules")
    problems += [f"{name} is missing" for name in required if fields.get(name) is None]
    for name, (valid, wanted) in UNDERSTOOD.items():
        if fields.get(name) is not None and not valid(fields[name]):
            problems.append(f"{name} = {json.dumps(fields[name])} is not {wanted}")
    if isinstance(fields.get("target_modules"), str) and fields.get("layers_to_transform") is not None:
        problems.append("layers_to_transform does not go with a regex in target_modules")  # PEFT's own rule
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; give an adapter that does without")
    return fields


def write_peft(
    folder: paths.PathLike, lora: dict, config: LoraConfig, *, base_name: str, revision: str | None = None
) -> None:
    """Write a `lora` tree as a PEFT folder, which appears after it was read back.

    `base_name` is where PEFT finds the base: a path or a name on the hub, at `revision`. `folder` must not exist, or be empty.
    """
    tensors, modules = {}, []
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for target in config.targets:
        factors = lora["layers"][BLOCKS[target]][target]
        layers = len(factors["lora_a"])
        table = zip(config.layer_ranks(target, layers), config.layer_alphas(target, layers), strict=True)
        for layer, (rank, alpha) in enumerate(table):
            if not rank:
                continue
            name = module_name(target, layer)
            modules.append(name)
            for letter, factor in (("A", factors["lora_a"][layer][:, :rank]), ("B", factors["lora_b"][layer][:rank])):
                key = KEY.format(module=name, factor=letter)
                tensors[key] = np.ascontiguousarray(np.asarray(factor, np.float32).T)  # save_file ignores strides
            rank_pattern |= {name: rank} if rank != config.rank else {}
            alpha_pattern |= {name: _number(alpha)} if alpha != config.alpha else {}
    everywhere = all(0 not in config.layer_ranks(target, layers) for target in config.targets)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        **({"revision": revision} if revision else {}),
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets) if everywhere else modules,
        "use_rslora": config.scaling == "rslora",
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": None,
        "inference_mode": True,
    }
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        verify_peft(partial, lora, config)


def _number(alpha: float) -> int | float:
    """An int where the alpha is whole, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


def verify_peft(folder: paths.PathLike, lora: dict, config: LoraConfig) -> None:
    """UserError unless the folder reads back as exactly these factors, ranks and scales."""
    expected = _leaves(lora)
    layers = len(next(iter(expected.values())))
    found, found_config, _ = read_peft(folder, layers)
    wrong = [] if _meaning(found_config, layers) == _meaning(config, layers) else [CONFIG]
    actual = _leaves(found)
    wrong += sorted(expected.keys() ^ actual.keys())
    both = expected.keys() & actual.keys()
    wrong += sorted(path for path in both if not np.array_equal(expected[path], actual[path], equal_nan=True))
    if wrong:
        raise UserError(f"{folder}: reads back other than it was written: {', '.join(wrong)}; check the disk")


def _meaning(config: LoraConfig, layers: int) -> tuple:
    """Equal for configs that compute the same, however they say it."""
    return config.dropout, {t: (config.layer_ranks(t, layers), config.layer_scales(t, layers)) for t in config.targets}


def _leaves(tree: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
