"""A sweep: its groups are planned, trained wave after wave over one base, and compared in tables and a picture."""

import dataclasses
import json
import pathlib
import resource
import shutil
from collections.abc import Iterator, Sequence

import ml_collections

from lowrank.cli.signals import stop_signals
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.lines import replace
from lowrank.formatting import format_bytes
from lowrank.runs import report
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.inputs import identity
from lowrank.runs.profiling import Profile
from lowrank.sweeping import grid as grid_lib
from lowrank.sweeping import group as group_lib
from lowrank.sweeping import picture, ranking, tables
from lowrank.sweeping.grid import Grid, Member
from lowrank.sweeping.group import Group
from lowrank.sweeping.ranking import Result
from lowrank.sweeping.wave import Wave, is_whole
from lowrank.training import partition
from lowrank.weights.load import load_params


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What came of a sweep. `members`: those that are trained, the best first, each a workdir under `workdir/members`."""

    workdir: pathlib.Path
    members: list[Result]
    stopped_by: str | None  # the signal that stopped the sweep; None: it is complete


def sweep(
    grid: Grid | ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    command: str = "lowrank.sweeping.sweep",
) -> SweepResult:
    """Train a sweep's members to their end, or resume the sweep that `workdir` holds; what is finished is not run again.

    `grid`: from `make_grid`, or a ConfigDict with `sweep` among its keys. SIGTERM, SIGHUP and Ctrl-C finish the step and save.
    `profile`: "START:STOP", the steps to trace for xprof, of the first wave that trains. Raises UserError.
    """
    workdir = paths.local(workdir)
    grid = grid if isinstance(grid, Grid) else grid_lib.make_grid(grid)
    groups = plan_groups(grid, workdir)
    profiled = Profile(profile, workdir, min(group.inputs.steps for group in groups))
    with workdir_lib.lock_workdir(workdir, workdir / "sweep.json", "sweep"), stop_signals() as stop:
        groups = _begin(workdir, grid, groups, overrides, command)
        print(describe(grid, groups))
        # Each member's workdir is locked with an open file while it trains.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, len(grid.members) + 1024)), hard))
        results: list[Result] = []
        drawn, stopped_by, programs = 0, None, None
        held: dict = {}  # the frozen base on the devices
        for number, group, members, folder in _list_waves(workdir, groups):
            done = folder / "results.json"
            if done.exists():
                results += _read_finished(workdir, group, members, folder)
            else:
                if stopped_by := stop():  # in the last step of the wave before
                    break
                print(f"\ngroup {number} of {len(groups)}, {title(group)}: {len(members)} members train together")
                if programs is None or programs.group is not group:
                    programs = group_lib.Programs(group)
                origin = (overrides, command)
                wave = Wave(group, programs, members, _load_frozen(group, held), workdir, folder, origin)
                found, stopped_by = wave.train(stop, profiled)
                del wave  # its state on the devices
                if stopped_by:
                    break
                profiled = Profile(None, workdir)  # only the first wave is traced
                replace(done, json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
                results += found
                _write_tables(workdir, results)
                drawn = len(results)
            # Left behind if the sweep was killed just after this wave was finished.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        else:
            if drawn < len(results):
                _write_tables(workdir, results)
            print(closing(workdir, groups, results))
        if stopped_by:
            print("run the same command again to go on")
    return SweepResult(workdir, ranking.rank_members(results), stopped_by)


def plan_groups(grid: Grid, workdir: paths.Path | None = None) -> list[Group]:
    """The groups of a grid's members; everything that can be wrong is refused here, before anything is computed."""
    wandb = next((member.config.log.wandb for member in grid.members if member.config.log.wandb), None)
    if wandb:
        raise UserError(
            f"config.log.wandb={wandb}: a sweep's members train at once, W&B knows one run at a time; leave it out"
        )
    known: dict = {}
    groups = [group_lib.plan(members, grid.sweep, known, workdir) for members in grid_lib.group_members(grid.members)]
    refuse_unusable_ranks(groups)
    if any(group.inputs.held_out and not group.config.eval.every for group in groups):  # one batch's loss ranks nothing
        raise UserError(
            "config.eval.every=0: a sweep compares its members by what is held out; say --config.eval.every=N"
        )
    return groups


def _begin(
    workdir: pathlib.Path, grid: Grid, groups: list[Group], overrides: Sequence[str], command: str
) -> list[Group]:
    """Write `sweep.json`, or check the one that is there -> the groups, split into waves as the sweep began with."""
    file = workdir / "sweep.json"
    record: dict = {"members": {m.name: m.swept for m in grid.members}, "sweep": dataclasses.asdict(grid.sweep)}
    sizes = [[group.size, group.at_once] for group in groups]
    if file.exists():
        before = _read_json(file)
        refuse_other_grid(file, before, json.loads(json.dumps(record | {"parts": sizes})))
        sizes = before["parts"]  # as chosen from the memory that there was then
    record = workdir_lib.origin(command, overrides) | record | {"parts": sizes}
    replace(file, json.dumps(record, indent=1) + "\n")
    groups = [
        # On more devices than it began with each has fewer members.
        dataclasses.replace(group, size=size, at_once=min(at_once, -(-size // group.mesh.shape["member"])))
        for group, (size, at_once) in zip(groups, sizes, strict=True)
    ]
    refuse_other_members(workdir, groups)
    return groups


def _list_waves(
    workdir: pathlib.Path, groups: list[Group]
) -> Iterator[tuple[int, Group, tuple[Member, ...], pathlib.Path]]:
    """Each wave: its group's number and its group, its members, its folder, with `results.json` when it is finished."""
    for number, group in enumerate(groups):
        for i, members in enumerate(group.waves):
            yield number + 1, group, members, workdir / "groups" / f"{number}.{i}"


def _load_frozen(group: Group, held: dict) -> dict:
    """A group's frozen leaves. `held` keeps the base for the next group; another one is freed before it is read."""
    _, shapes = partition.split(group.shapes, group.mask)
    base = group.inputs.base
    if group.config.train.mode == "full":
        held.clear()
        return shapes  # all holes
    assert base is not None  # adapters need a base
    key = (base.fingerprint, group.model.param_dtype, group.mesh)
    if key not in held:
        held.clear()
        held[key] = {"params": load_params(base, shapes["params"])}
    return shapes | held[key]


def refuse_unusable_ranks(groups: list[Group]):
    """Refuse a rank that exceeds every matrix it adapts; print a note for one that exceeds some of them."""
    above_all: dict[str, None] = {}
    above_some: dict[str, None] = {}
    for group in groups:
        sizes = {target: min(shape) for target, shape in group.inputs.architecture.projections().items()}
        for lora in [member.config.lora for member in group.members if member.config.adapter]:
            above = [target for target in lora.targets if lora.width(target) > sizes[target]]
            named = any(target in dict(lora.ranks) for target in above)  # a rank for this very target
            if above:
                matrices = ", ".join(f"{target} ({sizes[target]})" for target in above)
                text = f"rank {max(map(lora.width, above))} above {matrices}"
                (above_all if named or len(above) == len(lora.targets) else above_some)[text] = None
    if above_all:
        raise UserError(f"{'; '.join(above_all)}: no update of these matrices can have it; use a smaller rank")
    for line in above_some:
        print(f"note       {line}: there the update cannot use all of it")


def refuse_other_grid(file: pathlib.Path, before: dict, now: dict):
    """A sweep resumes with exactly the members and the waves that it began with."""
    if not isinstance(before, dict) or before.keys() < now.keys():
        raise UserError(f"{file} is not the sweep.json of a sweep; choose another --workdir")
    old, new, lines = before["members"], now["members"], []
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    for what, names in (("no longer has", gone), ("also has", added)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"the grid {what} {'; '.join(names[:3])}{more}")
    lines += [f"{name} has other values" for name in old if name in new and old[name] != new[name]]
    if not lines and list(old) != list(new):
        lines.append("the members come in another order")
    for key, value in before["sweep"].items():
        if value != now["sweep"].get(key):
            lines.append(f"config.sweep.{key} was {value} and is {now['sweep'].get(key)}")
    if lines:
        raise UserError(f"workdir {file.parent} holds another sweep: {'; '.join(lines)}; choose another --workdir")


def refuse_other_members(workdir: pathlib.Path, groups: list[Group]):
    """A member that was begun must be the same run, of the same length; a finished one may have gone on alone."""
    of_members: dict[str, list[str]] = {}
    for _, group, wave, folder in _list_waves(workdir, groups):
        finished = (folder / "results.json").exists()
        free = [key for key in workdir_lib.FREE_ON_RESUME if finished or key not in ("train.steps", "train.epochs")]
        for member in wave:
            place = workdir / "members" / member.name
            if (place / "config.json").exists():
                own = identity(member.config, group.inputs)
                before = workdir_lib.read_record(place)  # members are compared: all of them by the same evaluation data
                for line in workdir_lib.resume_differences(before, member.config, own, free, free_content=()):
                    of_members.setdefault(line, []).append(member.name)
    lines = [f"{line} (in {names[0]}{' and others' * (len(names) > 1)})" for line, names in of_members.items()]
    if lines:
        raise UserError(
            f"workdir {workdir} holds another sweep, which cannot go on with: {'; '.join(lines)}; choose another --workdir, "
            "or give the sweep what it began with"
        )


def _read_finished(
    workdir: pathlib.Path, group: Group, members: tuple[Member, ...], folder: pathlib.Path
) -> list[Result]:
    """The results of a finished wave. Refused is one of another length, or one whose last checkpoints cannot be read."""
    file = folder / "results.json"
    try:
        # Swept values come from the grid, because JSON has no tuples.
        found = [Result(**one | {"swept": m.swept}) for m, one in zip(members, _read_json(file), strict=True)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not what a wave ends with ({error}); remove it to train that wave again") from None
    steps, damaged = group.inputs.steps, []
    for member, result in zip(members, found, strict=True):
        if result.diverged is None and result.steps != steps:
            raise UserError(
                f"workdir {workdir} holds another sweep: {result.name} was trained for {result.steps} steps, and the "
                f"config asks for {steps}; choose another --workdir"
            )
        place = workdir / "members" / member.name
        if result.steps and not is_whole(group, member, place, result.steps):
            damaged.append(f"{place}/checkpoints/{result.steps}")
    if damaged:
        raise UserError(
            f"the checkpoint {' and '.join(damaged)} of a finished member cannot be read; remove {folder} "
            "to have its group trained again, or put the checkpoint back"
        )
    return found


def _read_json(file: pathlib.Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, or choose another --workdir") from None


def title(group: Group) -> str:
    """The swept values that all members of the group share."""
    keys = [key for key in group.members[0].swept if len({str(m.swept.get(key)) for m in group.members}) == 1]
    shared = [f"{key} {grid_lib.name_value(group.members[0].swept[key])}" for key in keys]
    return ", ".join(shared) or "all of the grid"


def describe(grid: Grid, groups: list[Group]) -> str:
    lines = [f"sweep      {len(grid.members)} members over {', '.join(grid.keys)}, in {len(groups)} groups"]
    if grid.repeated:
        lines.append(
            f"note       {grid.repeated} combinations are left out: in mode full neither the adapter nor the seed matters"
        )
    for number, group in enumerate(groups, start=1):
        config, shape, waves = group.config, group.mesh.shape, len(group.waves)
        trainable, frozen = map(partition.nbytes, partition.split(group.shapes, group.mask))
        base = f", padded to the widest; base {format_bytes(frozen)}, once, held in {config.param_dtype}"
        lines += [
            "",
            f"group {number}    {title(group)}: {len(group.members)} members, {waves} wave{'s' * (waves > 1)} of {group.size} "
            f"in one compiled step, {group.at_once} at once in the model",
            f"trained    {format_bytes(trainable)} a member{base * (config.train.mode == 'lora')}; computed in {config.dtype}",
            f"mesh       member {shape['member']} x fsdp {shape['fsdp']} x tensor {shape['tensor']} "
            f"({group.mesh.devices.size} x {group.mesh.devices.flat[0].device_kind})",
        ]
        data = report.describe_data(config, group.inputs)
        if data not in lines:
            lines.append(data)
    return "\n".join(lines)


def _write_tables(workdir: pathlib.Path, results: list[Result]):
    tables.write_csv(workdir / "sweep.csv", results)
    replace(workdir / "sweep.md", tables.describe(results, workdir.name))
    picture.write_picture(workdir / "sweep.png", results, workdir.name)


def closing(workdir: pathlib.Path, groups: list[Group], results: list[Result]) -> str:
    ranked = ranking.rank_members(results)
    lines = ["", "best members"]
    for place, result in enumerate(ranked[:5], start=1):
        lines.append(f"  {place}. {'diverged' if result.diverged else tables.format_loss(result.score)}  {result.name}")
    lines += ["", f"tables     {workdir}/sweep.md, {workdir}/sweep.csv", f"picture    {workdir}/sweep.png"]
    best = ranked[0]
    base = next(member.config.base for group in groups for member in group.members if member.name == best.name)
    if base and best.steps:
        adapter = f"'{workdir}/members/{best.name}'"
        lines.append(f"try        python -m lowrank.generate --base={base} --adapter={adapter} --prompt=…")
    return "\n".join(lines)
