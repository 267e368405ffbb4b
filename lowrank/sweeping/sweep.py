"""A sweep: its groups are planned, trained wave after wave over one base, and compared in tables and a picture."""

import dataclasses
import json
import pathlib
import resource
import shutil
from collections.abc import Sequence

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
from lowrank.sweeping import picture, ranking, tables, workdirs
from lowrank.sweeping import wave as wave_lib
from lowrank.sweeping.grid import Grid
from lowrank.sweeping.group import Group
from lowrank.sweeping.ranking import Result
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

    `grid`: from `make_grid`, or a ConfigDict with `sweep` among its keys. SIGTERM and Ctrl-C finish the step and save.
    `profile`: "START:STOP", the steps to trace for xprof, of the first wave that trains. Raises UserError.
    """
    folder = paths.local(workdir)
    grid = grid if isinstance(grid, Grid) else grid_lib.make_grid(grid)
    groups = plan_groups(grid)
    profiled = Profile(profile, folder)
    profiled.check(min(group.inputs.steps for group in groups))
    origin = wave_lib.Origin(overrides, command)
    with workdir_lib.lock_workdir(folder, folder / "sweep.json", "sweep"), stop_signals() as stop:
        groups = _begin(folder, grid, groups, origin)
        print(describe(grid, groups))
        allow_open_files(sum(len(group.members) for group in groups))
        results: list[Result] = []
        stopped_by = None
        try:
            for found, is_new in _train_waves(folder, groups, origin, stop, profiled):
                results += found
                if is_new:
                    write_tables(folder, results)
        except wave_lib.Stopped as stopped:
            stopped_by = str(stopped)
            print("run the same command again to go on")
        else:
            write_tables(folder, results)
            print(closing(folder, groups, results))
    return SweepResult(folder, ranking.rank_members(results), stopped_by)


def plan_groups(grid: Grid) -> list[Group]:
    """The groups of a grid's members; everything that can be wrong is refused here, before anything is computed."""
    wandb = next((member.config.log.wandb for member in grid.members if member.config.log.wandb), None)
    if wandb:
        raise UserError(
            f"config.log.wandb={wandb}: a sweep's members train at once, W&B knows one run at a time; leave it out"
        )
    known: dict = {}
    groups = [group_lib.plan(members, grid.sweep, known) for members in grid_lib.group_members(grid.members)]
    refuse_unusable_ranks(groups)
    refuse_without_evaluation(groups)
    return groups


def _begin(workdir: pathlib.Path, grid: Grid, groups: list[Group], origin: wave_lib.Origin) -> list[Group]:
    """Write `sweep.json`, or check the one that is there -> the groups, split into waves as the sweep began with."""
    file = workdir / "sweep.json"
    record: dict = {"members": {m.name: m.swept for m in grid.members}, "sweep": dataclasses.asdict(grid.sweep)}
    sizes = [[group.size, group.at_once] for group in groups]
    if file.exists():
        before = read_json(file)
        refuse_other_grid(file, before, json.loads(json.dumps(record | {"parts": sizes})))
        sizes = before["parts"]  # as chosen from the memory that there was then
    record = workdir_lib.origin(origin.command, origin.overrides) | record | {"parts": sizes}
    replace(file, json.dumps(record, indent=1) + "\n")
    groups = [
        # On more devices than it began with each has fewer members.
        dataclasses.replace(group, size=size, at_once=min(at_once, -(-size // group.mesh.shape["member"])))
        for group, (size, at_once) in zip(groups, sizes, strict=True)
    ]
    refuse_other_members(workdir, groups)
    return groups


def _train_waves(workdir: pathlib.Path, groups: list[Group], origin: wave_lib.Origin, stop, profile: Profile):
    """Train one group after the other, wave after wave; yields (results, whether the wave was trained now) of each.
    Raises wave.Stopped."""
    bases = Bases()
    for number, group in enumerate(groups):
        programs = None
        for i, wave in enumerate(group.waves):
            folder, done = wave_folder(workdir, number, i)
            is_new = not done.exists()
            if not is_new:
                found = read_results(done, wave)
                refuse_other_length(workdir, group, found)
                refuse_damaged(workdir, folder, group, wave, found)
            else:
                if stopped_by := stop():  # in the last step of the wave before
                    raise wave_lib.Stopped(stopped_by)
                print(f"\ngroup {number + 1} of {len(groups)}, {title(group)}: {len(wave)} members train together")
                programs = programs or group_lib.Programs(group)
                frozen = bases.frozen(group)
                found = wave_lib.train_wave(group, programs, wave, frozen, workdir, folder, origin, stop, profile)
                profile = Profile(None, workdir)  # only the first wave is traced
                replace(done, json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
            # Left behind if the sweep was killed just after this wave was finished.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            yield found, is_new


def wave_folder(workdir: pathlib.Path, group: int, wave: int) -> tuple[pathlib.Path, pathlib.Path]:
    """-> (where a wave keeps its checkpoints, the file that is there when it is finished)."""
    folder = workdir / "groups" / f"{group}.{wave}"
    return folder, folder / "results.json"


def allow_open_files(members: int):
    """Raise the limit of open files: each member's workdir is locked with one while it trains."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = members + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


class Bases:
    """The frozen base on the devices, held once; read again when a group needs another one than the group before."""

    def __init__(self):
        self._key = self._frozen = None

    def frozen(self, group: Group) -> dict:
        _, shapes = partition.split(group.shapes, group.mask)
        if group.config.train.mode == "full":
            self._key = self._frozen = None
            return shapes  # all holes
        assert group.inputs.base is not None  # adapters need a base
        key = (group.inputs.base.fingerprint, group.model.param_dtype, group.mesh)
        if key != self._key:
            self._key = self._frozen = None  # freed before the next one is read
            self._frozen = {"params": load_params(group.inputs.base, shapes["params"])}
            self._key = key
        return shapes | self._frozen


# ---- What is refused ---------------------------------------------------------------------------------------------------


def refuse_unusable_ranks(groups: list[Group]):
    """Refuse a rank that exceeds every matrix it adapts; print a note for one that exceeds some of them."""
    found = [group_lib.unusable_ranks(group) for group in groups]
    above_all = list(dict.fromkeys(line for lines, _ in found for line in lines))
    if above_all:
        raise UserError(f"{'; '.join(above_all)}: no update of these matrices can have it; use a smaller rank")
    for line in dict.fromkeys(line for _, lines in found for line in lines):
        print(f"note       {line}: there the update cannot use all of it")


def refuse_without_evaluation(groups: list[Group]):
    """Refuse held-out data that is never evaluated: members would be ranked by the loss of one training batch."""
    if any(group.inputs.held_out and not group.config.eval.every for group in groups):
        raise UserError(
            "config.eval.every=0: a sweep compares its members by what is held out; say --config.eval.every=N"
        )


def refuse_other_grid(file: pathlib.Path, before: dict, now: dict):
    """A sweep resumes with exactly the members and the waves that it began with."""
    if not isinstance(before, dict) or before.keys() < now.keys():
        raise UserError(f"{file} is not the sweep.json of a sweep; choose another --workdir")
    lines = []
    gone = [name for name in before["members"] if name not in now["members"]]
    new = [name for name in now["members"] if name not in before["members"]]
    for what, names in (("no longer has", gone), ("also has", new)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"the grid {what} {'; '.join(names[:3])}{more}")
    same = [name for name in before["members"] if name in now["members"]]
    lines += [f"{name} has other values" for name in same if before["members"][name] != now["members"][name]]
    if list(before["members"]) != list(now["members"]) and not lines:
        lines.append("the members come in another order")
    for key, value in before["sweep"].items():
        if value != now["sweep"].get(key):
            lines.append(f"config.sweep.{key} was {value} and is {now['sweep'].get(key)}")
    if lines:
        raise UserError(f"workdir {file.parent} holds another sweep: {'; '.join(lines)}; choose another --workdir")


def refuse_other_members(workdir: pathlib.Path, groups: list[Group]):
    """A member that was begun must be the same run, of the same length; a finished one may have gone on alone."""
    of_members: dict[str, list[str]] = {}
    begun = [
        (group, member, wave_folder(workdir, number, i)[1].exists())
        for number, group in enumerate(groups)
        for i, wave in enumerate(group.waves)
        for member in wave
    ]
    for group, member, finished in begun:
        free = [key for key in workdir_lib.FREE_ON_RESUME if finished or key not in ("train.steps", "train.epochs")]
        place = workdir / "members" / member.name
        if (place / "config.json").exists():
            own = identity(member.config, group.inputs)
            for line in workdir_lib.resume_differences(workdir_lib.read_record(place), member.config, own, free):
                of_members.setdefault(line, []).append(member.name)
    if of_members:
        lines = [f"{line} (in {names[0]}{' and others' * (len(names) > 1)})" for line, names in of_members.items()]
        raise UserError(
            f"workdir {workdir} holds another sweep, which cannot go on with: {'; '.join(lines)}; choose another --workdir, "
            "or give the sweep what it began with"
        )


def refuse_other_length(workdir: pathlib.Path, group: Group, results: list[Result]):
    """A finished wave is not trained again, so it must be as long as the config asks for."""
    steps = group.inputs.steps
    other = [result for result in results if result.diverged is None and result.steps != steps]
    if other:
        raise UserError(
            f"workdir {workdir} holds another sweep: {other[0].name} was trained for {other[0].steps} steps, and the config "
            f"asks for {steps}; choose another --workdir"
        )


def refuse_damaged(workdir: pathlib.Path, folder: pathlib.Path, group: Group, wave, results: list[Result]):
    """Refuse a finished member whose last checkpoint cannot be read."""
    damaged = []
    for member, result in zip(wave, results, strict=True):
        place = workdir / "members" / member.name
        if result.steps and not workdirs.adapter_is_whole(group, member, place, result.steps):
            damaged.append(f"{place}/checkpoints/{result.steps}")
    if damaged:
        raise UserError(
            f"the checkpoint {' and '.join(damaged)} of a finished member cannot be read; remove {folder} "
            "to have its group trained again, or put the checkpoint back"
        )


def read_results(file: pathlib.Path, wave) -> list[Result]:
    """The results of a finished wave; swept values come from the grid, because JSON has no tuples."""
    found = read_json(file)
    try:
        return [Result(**one | {"swept": member.swept}) for member, one in zip(wave, found, strict=True)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not what a wave ends with ({error}); remove it to train that wave again") from None


def read_json(file: pathlib.Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, or choose another --workdir") from None


# ---- What is said ------------------------------------------------------------------------------------------------------


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
        trainable, frozen = partition.split(group.shapes, group.mask)
        config, data = group.config, report.describe_data(group.config, group.inputs)
        adapted = config.train.mode == "lora"
        lines += [
            "",
            f"group {number}    {title(group)}: {len(group.members)} members, {len(group.waves)} wave{'s' * (len(group.waves) > 1)} "
            f"of {group.size} in one compiled step, {group.at_once} at once in the model",
            f"trained    {format_bytes(partition.nbytes(trainable))} a member"
            + (
                f", padded to the widest; base {format_bytes(partition.nbytes(frozen))}, once, held in {config.param_dtype}"
                * adapted
            )
            + f"; computed in {config.dtype}",
            f"mesh       member {group.mesh.shape['member']} x fsdp {group.mesh.shape['fsdp']} x tensor "
            f"{group.mesh.shape['tensor']} ({group.mesh.devices.size} x {group.mesh.devices.flat[0].device_kind})",
            *([data] if data not in lines else []),
        ]
    return "\n".join(lines)


def write_tables(workdir: pathlib.Path, results: list[Result]):
    tables.write_csv(workdir / "sweep.csv", results)
    replace(workdir / "sweep.md", tables.describe(results, workdir.name))
    picture.write_picture(workdir / "sweep.png", results, workdir.name)


def closing(workdir: pathlib.Path, groups: list[Group], results: list[Result]) -> str:
    ranked = ranking.rank_members(results)
    lines = ["", "best members"]
    for place, result in enumerate(ranked[:5], start=1):
        loss = ranking.choose_loss(result, ranking.has_held_out(results))
        value = "diverged" if result.diverged else tables.format_loss(loss)
        lines.append(f"  {place}. {value}  {result.name}")
    best = ranked[0]
    lines += ["", f"tables     {workdir}/sweep.md, {workdir}/sweep.csv", f"picture    {workdir}/sweep.png"]
    base = next(m.config.base for group in groups for m in group.members if m.name == best.name)
    if base and best.steps:
        lines.append(
            f"try        python -m lowrank.generate --base={base} --adapter='{workdir}/members/{best.name}' --prompt=…"
        )
    return "\n".join(lines)
