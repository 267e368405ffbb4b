"""Adapters on the disk, whoever wrote them: a workdir's or a PEFT folder's, opened alike; and a run that starts from one."""

import dataclasses
from collections.abc import Callable

import jax

from lowrank.adapters.config import LoraConfig
from lowrank.config import Config
from lowrank.errors import UserError
from lowrank.files import hub, paths
from lowrank.parallel import mesh as mesh_lib
from lowrank.runs import workdir
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.metrics import read_evaluations
from lowrank.training import partition
from lowrank.weights.base import Base
from lowrank.weights.peft import read_peft


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What was trained, still on the disk. `lora` is None where it is a whole model, of a full fine-tuning."""

    folder: paths.Path
    lora: LoraConfig | None
    format: str | None  # of the prompts it was trained on, if that is known
    tokenizer: str | None  # that it was trained with, if not the base's own
    base: str | None  # the fingerprint of the base it was trained over, if that is known
    step: int | None  # after which step, if that is known
    restore: Callable[[dict], dict]  # the trained leaves, laid out as the given ones; UserError if they do not fit


def read_adapter(folder, step: int | str | None = None, base: Base | None = None) -> Adapter:
    """Open the adapter in a workdir, in a folder of PEFT or mlx-lm, or of a name on the hub.

    `step`: which checkpoint of a workdir: its number, "best" (by evaluation loss) or "last" (as None). A `folder` that ends
    in @best, @last or @NUMBER says the same. `base`: what it goes on, if that is known: PEFT's settings do not say how many
    layers it has.
    """
    folder, step = split_step(folder, step)
    if (folder / "adapter_config.json").is_file():
        if step not in (None, "last"):
            raise UserError(f"step {step} is asked for, but {folder} is no workdir: it holds one adapter; leave it out")
        tree, lora, made_for = read_peft(folder, base=base)

        def fit(wanted: dict) -> dict:
            if misfits := partition.misfits({"lora": tree}, wanted):
                of = f", which was made for {made_for}," if made_for else ""
                raise UserError(f"adapter {folder}{of} does not fit the model: {'; '.join(misfits)}; give its own base")
            as_wanted = lambda leaf, like: mesh_lib.put(leaf.astype(like.dtype), like.sharding)  # noqa: E731
            return jax.tree.map(as_wanted, {"lora": tree}, wanted)

        return Adapter(folder, lora, format=None, tokenizer=None, base=None, step=None, restore=fit)
    if not (folder / "config.json").is_file():
        for parent in (folder.parent, folder.parent.parent):  # RUN/checkpoints, RUN/checkpoints/STEP
            if (parent / "config.json").is_file() and (parent / "checkpoints").is_dir():
                raise UserError(f"adapter {folder} is a part of the run {parent}; name that, --adapter={parent}")
        raise UserError(
            f"adapter {folder} is neither a workdir (no config.json) nor a PEFT folder (no adapter_config.json); "
            "name the --workdir of a training run, the folder of a PEFT adapter, or one on the hub"
        )
    run, trained_over = workdir.read_config(folder), workdir.read_record(folder)["identity"]["base"]
    saved = choose_step(folder, step)

    def restore(wanted: dict) -> dict:
        with Checkpoints(folder, read_only=True) as checkpoints:
            return checkpoints.restore_adapter(saved, wanted)

    return Adapter(folder, run.adapter, run.data.format, run.tokenizer, trained_over, saved, restore)


def split_step(folder, step: int | str | None = None) -> tuple[paths.Path, int | str | None]:
    """DIR@best, DIR@last or DIR@NUMBER -> (DIR, which step); anything else, or a name on the hub -> (its folder, `step`).

    An opened adapter is the one in its folder.
    """
    if isinstance(folder, Adapter):
        return folder.folder, folder.step if step is None else step
    name, _, wanted = str(folder).rpartition("@")
    is_step = bool(name) and (wanted in ("best", "last") or wanted.isdecimal()) and paths.path(name).exists()
    if not is_step or paths.path(folder).exists():
        return hub.adapter_folder(folder), step
    if step not in (None, wanted):
        raise UserError(f"{folder} says step {wanted}, and --step={step} another; leave one out")
    return paths.path(name), wanted


def refuse_step_of_none(step: int | str | None, adapter) -> None:
    """UserError for a step where there is no adapter."""
    if step is not None and not adapter:
        raise UserError(f"step {step} is asked for, which names a checkpoint, but there is no adapter; leave it out")


def choose_step(workdir: paths.Path, step: int | str | None) -> int:
    """The step of a checkpoint: `step` itself, the "best" by evaluation loss, the "last" (None); UserError without one."""
    if not (step in (None, "best", "last") or str(step).isdecimal()):
        raise UserError(f"step {step} is no step; give a number, best or last")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = sorted(checkpoints.steps())
    if steps and step in (None, "last"):
        return steps[-1]
    if steps and step == "best":
        losses = {at: loss for at, loss in read_evaluations(workdir).items() if at in steps}
        if not losses:
            raise UserError(f"workdir {workdir} has no evaluation, which would tell the best step; leave the step out")
        return min(losses, key=lambda at: (losses[at], at))
    if step in (None, "best", "last") or int(step) not in steps:
        has = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
        of = f" of step {step}" if str(step).isdecimal() else ""
        raise UserError(f"workdir {workdir} has no checkpoint{of}; it has {has}")
    return int(step)


def read_init_adapter(config: Config, base: Base | None) -> Adapter:
    """Open `config.init_adapter`; UserError if it holds no adapter, was trained over another base, or means something else
    under the config's settings."""
    assert base is not None and config.init_adapter  # a run from scratch has no adapter
    adapter = read_adapter(config.init_adapter, base=base)
    if adapter.lora is None:
        raise UserError(
            f"config.init_adapter={config.init_adapter} is a full fine-tuning: it holds no adapter; name another run"
        )
    if adapter.base not in (None, base.fingerprint):
        raise UserError(
            f"config.init_adapter={config.init_adapter} was trained over other weights than those in {base.folder}; "
            "give its own base"
        )
    check_init_adapter(adapter, config, base.config.layers)
    return adapter


def check_init_adapter(adapter: Adapter, config: Config, layers: int) -> None:
    """Refuse an adapter to start from that means something else under the config's settings."""
    lora, there = config.lora, adapter.lora
    assert there is not None  # `read_init_adapter` refuses a whole model
    differing = [
        f"lora.{name} is {getattr(there, name)} there and {getattr(lora, name)} here"
        for name in ("rank", "alpha", "scaling")
        if getattr(there, name) != getattr(lora, name)
    ]
    if set(there.targets) != set(lora.targets):
        differing.append(f"lora.targets is {there.targets} there and {lora.targets} here")
    elif lora.uneven:

        def alphas_in_use(lora: LoraConfig, target: str, layers: int) -> tuple[float | None, ...]:
            """None where the rank is 0: PEFT's files hold no alpha there, so nothing can differ."""
            pairs = zip(lora.layer_ranks(target, layers), lora.layer_alphas(target, layers), strict=False)
            return tuple(alpha if rank else None for rank, alpha in pairs)

        for name, values_of in (("ranks", LoraConfig.layer_ranks), ("alphas", alphas_in_use)):
            theirs, ours = ({t: values_of(own, t, layers) for t in lora.targets} for own in (there, lora))
            if theirs != ours:
                differing.append(f"lora.{name} is {theirs} there and {ours} here")
    if differing:
        flags = [f"--config.lora.{name}={getattr(there, name)}" for name in ("rank", "alpha", "scaling")]
        flags += [f"--config.lora.targets={','.join(there.targets)}"]
        raise UserError(
            f"config.init_adapter={config.init_adapter} does not fit this config: {'; '.join(differing)}; "
            f"say {' '.join(flags)}"
        )


def with_ranks_of(config: Config, lora: LoraConfig | None) -> Config:
    """The config with the ranks and alphas of the adapter that the run starts from, unless it names its own."""
    if lora is None or config.lora.uneven:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, ranks=lora.ranks, alphas=lora.alphas))


def refuse_other_layers(lora: LoraConfig, layers: int) -> None:
    """Refuse ranks and alphas for more or fewer layers than the base has."""
    wrong = [
        f"config.lora.{name}.{target} has {len(values)} values"
        for name in ("ranks", "alphas")
        for target, values in getattr(lora, name)
        if len(values) not in (1, layers)
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; the base has {layers} layers: give one value for each, or one for all")
