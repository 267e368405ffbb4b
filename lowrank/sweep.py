"""Train many adapters over one base, in one compiled step: which rank is enough, at which rate?

    python -m lowrank.sweep --config=configs/rank_sweep.py --workdir=runs/rank_sweep
    python -m lowrank.sweep --config=configs/alpaca.py --workdir=runs/ranks --config.base=DIR --config.data.train=FILE \\
        --config.sweep.lora.rank="(1,4,16,64)" --config.sweep.optim.learning_rate="(1e-4,3e-4,1e-3)"

`config.sweep` mirrors the config: a tuple of values stands where the config has one value, and the members are the product.
Each member equals the same run alone and becomes a workdir under members/; sweep.csv, sweep.md and sweep.png compare them.
The same command again goes on where it was stopped, to the bit; what is finished is not run again.
"""

import dataclasses
import json
import pathlib
import resource
import shutil

from absl import flags

from lowrank.cli import run as cli
from lowrank.cli import signals
from lowrank.cli.run import STOPPED
from lowrank.errors import UserError
from lowrank.files import lines as lines_lib
from lowrank.files import paths
from lowrank.formatting import format_bytes
from lowrank.runs import report
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.inputs import identity
from lowrank.sweeping import grid as grid_lib
from lowrank.sweeping import group as group_lib
from lowrank.sweeping import picture as sweep_picture
from lowrank.sweeping import ranking as standings
from lowrank.sweeping import tables as sweep_tables
from lowrank.sweeping import wave as part_lib
from lowrank.sweeping.grid import Grid
from lowrank.sweeping.group import Group
from lowrank.sweeping.ranking import Result
from lowrank.training import partition
from lowrank.weights.load import load_params

flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, an ml_collections config; --config.KEY=VALUE overrides.")
flags.DEFINE_string("workdir", None, "The folder of this sweep: made if absent, resumed if it holds the same sweep.")
flags.DEFINE_bool("dry_run", False, "Print which members would be trained together, and at what cost; train nothing.")
FLAGS = flags.FLAGS


def main(arguments: list[str]) -> int | None:
    grid = grid_lib.read(FLAGS.config, arguments)
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError("--workdir is missing; say where the sweep is to live, --workdir=runs/NAME")
    workdir = paths.local(FLAGS.workdir or "")
    if wandb := next((member.config.log.wandb for member in grid.members if member.config.log.wandb), None):
        raise UserError(
            f"config.log.wandb={wandb}: a sweep's members train at once, W&B knows one run at a time; leave it out"
        )

    # ---- The groups: everything a user can get wrong is found before anything heavy begins.
    known: dict = {}
    groups = [group_lib.plan(members, grid.sweep, known) for members in grid_lib.groups(grid.members)]
    refuse_unusable_ranks(groups)
    refuse_without_evaluation(groups)
    if FLAGS.dry_run:
        print(describe(grid, groups))
        return None

    # ---- Workdir: a new sweep, or the same one again.
    file = workdir / "sweep.json"
    with workdir_lib.locked(workdir, file, "sweep"), signals.stop_signals() as stop:
        record = {"members": {m.name: m.swept for m in grid.members}, "sweep": dataclasses.asdict(grid.sweep)}
        record["parts"] = [[group.size, group.at_once] for group in groups]
        if file.exists():
            before = read_json(file)
            refuse_other_grid(file, before, json.loads(json.dumps(record)))
            record["parts"] = before["parts"]  # as chosen from the memory that there was then
        lines_lib.replace(file, json.dumps(workdir_lib.origin("sweep", arguments) | record, indent=1) + "\n")
        groups = [
            # On more devices than it began with each has fewer members.
            dataclasses.replace(group, size=size, at_once=min(at_once, -(-size // group.mesh.shape["member"])))
            for group, (size, at_once) in zip(groups, record["parts"], strict=True)
        ]
        refuse_other_members(workdir, groups)
        print(describe(grid, groups))
        allow_open_files(sum(len(group.members) for group in groups))

        # ---- One group after the other, and of a group one part after the other.
        results: list[Result] = []
        bases = Bases()
        for number, group in enumerate(groups):
            programs = None
            for i, part in enumerate(group.parts):
                folder, done = part_folder(workdir, number, i)
                if done.exists():
                    found = read_results(done, part)
                    refuse_other_length(workdir, group, found)
                    refuse_damaged(workdir, folder, group, part, found)
                    # There only if the sweep was killed just after this part was finished.
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                    results += found
                    continue
                if stop():  # in the last step of the part before
                    print("run the same command again to go on")
                    return STOPPED
                print(f"\ngroup {number + 1} of {len(groups)}, {title(group)}: {len(part)} members train together")
                programs = programs or group_lib.Programs(group)
                frozen = bases.frozen(group)
                try:
                    found = part_lib.train_part(group, programs, part, frozen, workdir, folder, arguments, stop)
                except part_lib.Stopped:
                    print("run the same command again to go on")
                    return STOPPED
                lines_lib.replace(done, json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                results += found
                write_tables(workdir, results)
        write_tables(workdir, results)
    print(closing(workdir, groups, results))
    return None


def part_folder(workdir: pathlib.Path, group: int, part: int) -> tuple[pathlib.Path, pathlib.Path]:
    """-> where a part keeps its checkpoints, and what is there when it is finished."""
    folder = workdir / "groups" / f"{group}.{part}"
    return folder, folder / "results.json"


def allow_open_files(members: int):
    """Each member's workdir is locked while it trains, with a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = members + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


class Bases:
    """The frozen base on the devices: read when a group needs another one than the group before, and held once."""

    def __init__(self):
        self._key = self._frozen = None

    def frozen(self, group: Group) -> dict:
        _, shapes = partition.split(group.shapes, group.mask)
        if group.config.train.mode == "full":
            self._key = self._frozen = None
            return shapes  # all holes
        key = (group.prepared.base.fingerprint, group.model.param_dtype, group.mesh)
        if key != self._key:
            self._key = self._frozen = None  # the one before goes before the next one comes
            self._frozen = {"params": load_params(group.prepared.base, shapes["params"])}
            self._key = key
        return shapes | self._frozen


# ---- What is refused ---------------------------------------------------------------------------------------------------


def refuse_unusable_ranks(groups: list[Group]):
    """A rank above the size of every matrix it adapts is a mistake; above the size of some of them, worth a word."""
    found = [group_lib.unusable_ranks(group) for group in groups]
    above_all = list(dict.fromkeys(line for lines, _ in found for line in lines))
    if above_all:
        raise UserError(f"{'; '.join(above_all)}: no update of these matrices can have it; use a smaller rank")
    for line in dict.fromkeys(line for _, lines in found for line in lines):
        print(f"note       {line}: there the update cannot use all of it")


def refuse_without_evaluation(groups: list[Group]):
    """What is held out and never looked at would leave the members ranked by the loss of one training batch."""
    if any(group.prepared.held_out and not group.config.eval.every for group in groups):
        raise UserError(
            "config.eval.every=0: a sweep compares its members by what is held out; say --config.eval.every=N"
        )


def refuse_other_grid(file: pathlib.Path, before: dict, now: dict):
    """A sweep goes on with the very members that it began with, split up as it was."""
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
    """A member that was begun must be the run that it would be now, and as long. (A finished one may have gone on alone.)"""
    of_members: dict[str, list[str]] = {}
    begun = [
        (group, member, part_folder(workdir, number, i)[1].exists())
        for number, group in enumerate(groups)
        for i, part in enumerate(group.parts)
        for member in part
    ]
    for group, member, finished in begun:
        free = [key for key in workdir_lib.FREE_ON_RESUME if finished or key not in ("train.steps", "train.epochs")]
        place = workdir / "members" / member.name
        if (place / "config.json").exists():
            own = identity(member.config, group.prepared)
            for line in workdir_lib.resume_differences(workdir_lib.read_record(place), member.config, own, free):
                of_members.setdefault(line, []).append(member.name)
    if of_members:
        lines = [f"{line} (in {names[0]}{' and others' * (len(names) > 1)})" for line, names in of_members.items()]
        raise UserError(
            f"workdir {workdir} holds another sweep, which cannot go on with: {'; '.join(lines)}; choose another --workdir, "
            "or give the sweep what it began with"
        )


def refuse_other_length(workdir: pathlib.Path, group: Group, results: list[Result]):
    """A finished part is not trained again, so it must have been trained for as long as is asked for now."""
    steps = group.prepared.steps
    other = [result for result in results if result.diverged is None and result.steps != steps]
    if other:
        raise UserError(
            f"workdir {workdir} holds another sweep: {other[0].name} was trained for {other[0].steps} steps, and the config "
            f"asks for {steps}; choose another --workdir"
        )


def refuse_damaged(workdir: pathlib.Path, folder: pathlib.Path, group: Group, part, results: list[Result]):
    """A finished member must still have what it was finished with."""
    damaged = []
    for member, result in zip(part, results, strict=True):
        place = workdir / "members" / member.name
        if result.steps and not part_lib.adapter_is_whole(group, member, place, result.steps):
            damaged.append(f"{place}/checkpoints/{result.steps}")
    if damaged:
        raise UserError(
            f"the checkpoint {' and '.join(damaged)} of a finished member cannot be read; remove {folder} "
            "to have its group trained again, or put the checkpoint back"
        )


def read_results(file: pathlib.Path, part) -> list[Result]:
    """What came of the members of a finished part; what was swept is taken from the grid: JSON knows no tuples."""
    found = read_json(file)
    try:
        return [Result(**one | {"swept": member.swept}) for member, one in zip(part, found, strict=True)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is not what a part ends with ({error}); remove it to train that part again") from None


def read_json(file: pathlib.Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, or choose another --workdir") from None


# ---- What is said ------------------------------------------------------------------------------------------------------


def title(group: Group) -> str:
    """What the members of the group have in common, of what is swept."""
    keys = [key for key in group.members[0].swept if len({str(m.swept.get(key)) for m in group.members}) == 1]
    shared = [f"{key} {grid_lib.text(group.members[0].swept[key])}" for key in keys]
    return ", ".join(shared) or "all of the grid"


def describe(grid: Grid, groups: list[Group]) -> str:
    lines = [f"sweep      {len(grid.members)} members over {', '.join(grid.keys)}, in {len(groups)} groups"]
    if grid.repeated:
        lines.append(
            f"note       {grid.repeated} combinations are left out: in mode full neither the adapter nor the seed matters"
        )
    for number, group in enumerate(groups, start=1):
        trainable, frozen = partition.split(group.shapes, group.mask)
        config, data = group.config, report.describe_data(group.config, group.prepared)
        adapted = config.train.mode == "lora"
        lines += [
            "",
            f"group {number}    {title(group)}: {len(group.members)} members, {len(group.parts)} part{'s' * (len(group.parts) > 1)} "
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
    sweep_tables.write_csv(workdir / "sweep.csv", results)
    lines_lib.replace(workdir / "sweep.md", sweep_tables.describe(results, workdir.name))
    sweep_picture.write_picture(workdir / "sweep.png", results, workdir.name)


def closing(workdir: pathlib.Path, groups: list[Group], results: list[Result]) -> str:
    ranked = standings.rank_members(results)
    lines = ["", "best members"]
    for place, result in enumerate(ranked[:5], start=1):
        loss = standings.loss_of(result, standings.held_out(results))
        value = "diverged" if result.diverged else sweep_tables.show_loss(loss)
        lines.append(f"  {place}. {value}  {result.name}")
    best = ranked[0]
    lines += ["", f"tables     {workdir}/sweep.md, {workdir}/sweep.csv", f"picture    {workdir}/sweep.png"]
    base = next(m.config.base for group in groups for m in group.members if m.name == best.name)
    if base and best.steps:
        lines.append(
            f"try        python -m lowrank.generate --base={base} --adapter='{workdir}/members/{best.name}' --prompt=…"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
