"""Checkpoints of a run, through Orbax: the only file that imports it.

A checkpoint is a folder `checkpoints/STEP/` of four items: `adapter` (the trainable leaves under their paths), `opt_state`,
`data` (the loader's position) and `meta`. The trees that are saved have holes where the base is, so a checkpoint cannot hold
a leaf of the base. Saving is asynchronous and atomic: a folder is renamed when it is complete; in a bucket, where nothing can
be renamed, the object `commit_success.txt` marks a complete one.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from lowrank.errors import UserError
from lowrank.files import bucket, paths
from lowrank.files.nested import set_path
from lowrank.parallel import distributed
from lowrank.training import partition
from lowrank.training.step import State

EVAL_LOSS = "eval/loss"
# Orbax warns of each folder that is opened to be read: from Python, in a notebook, that would be shown.
READ_ONLY_NOTES = ("CheckpointManagerOptions.read_only=True", "Given directory is read only")
logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(READ_ONLY_NOTES))
# Of a full or read-only disk, as texts: C++ libraries pass on nothing else.
DISK_SIGNS = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)]


@dataclasses.dataclass
class _Steps(ocp.checkpoint_managers.PreservationPolicy):
    steps: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step in self.steps() for checkpoint in checkpoints]


def nested(tree) -> dict:
    """Any tree -> nested dicts of its leaves by the names of their paths, without the holes, for Orbax."""
    result: dict = {}
    for name, leaf in partition.named_leaves(tree).items():
        set_path(result, name.split("/"), leaf)
    return result


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for the last save to be on disk."""

    def __init__(
        self,
        workdir: paths.Path,
        keep: int = 1,
        read_only: bool = False,
        also_keep: Callable[[], Collection[int]] = tuple,
    ):
        """Keeps the `keep` latest checkpoints, the best by evaluation loss, and the steps that `also_keep` gives at a save."""
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[EVAL_LOSS], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("adapter", "opt_state")}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}
        self.folder = epath.Path(str((workdir / "checkpoints").absolute()))  # on a disk or in a bucket
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best, _Steps(also_keep)]),
                save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when to save
                # Removes what a killed run left half written; a reader must not remove a save that is running.
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            ),
        )

    def __enter__(self):
        self._hook, sys.unraisablehook = sys.unraisablehook, self._ignore_late_writes
        return self

    def __exit__(self, error, *_):
        if error and distributed.is_running():
            return  # the other processes do not know of this error: waiting for them would never end
        try:
            self.wait()
        finally:
            self.manager.close()
            sys.unraisablehook = self._hook

    def _ignore_late_writes(self, unraisable):
        """After a failed save its other writes report to an event loop that Orbax has closed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def wait(self):
        """Wait until the last save is on the disk; raises its failure."""
        with self._disk_errors():
            self.manager.wait_until_finished()

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        return list(self.manager.all_steps())

    def save(self, step: int, state: State, data: dict, meta: dict, eval_loss: float | None = None):
        """Start saving; raises the failure of the save before."""
        with self._disk_errors():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    adapter=ocp.args.StandardSave(nested(state.trainable)),
                    opt_state=ocp.args.StandardSave(nested(state.opt_state)),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if eval_loss is None else {EVAL_LOSS: eval_loss},
            )

    def meta(self, step: int) -> dict:
        return self._read(step, meta=ocp.args.JsonRestore()).meta

    def check(self, step: int):
        """UserError if a checkpoint lacks an item, or its small items cannot be read."""
        self._read(step, meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        with self._read_errors(step):
            metadata = self.manager.item_metadata(step)
            if missing := [item for item in ("adapter", "opt_state") if not dict(metadata[item] or {})]:
                raise ValueError(f"no {' and no '.join(missing)}")

    def forget(self):
        """Remove all checkpoints."""
        for step in self.steps():
            (self.folder / str(step)).rmtree()
        self.manager.reload()

    def restore(self, step: int, state: State) -> tuple[State, dict]:
        """-> (the state saved at `step`, laid out as `state` (ShapeDtypeStructs), whose step and key it keeps; the data's
        position)."""
        data = self._read(step, data=ocp.args.JsonRestore()).data
        trees = self._restore_trees(step, adapter=state.trainable, opt_state=state.opt_state)
        return state._replace(trainable=trees["adapter"], opt_state=trees["opt_state"]), data

    def restore_adapter(self, step: int, trainable: dict) -> dict:
        """-> the trainable tree saved at `step`, laid out as `trainable`; UserError if their leaves differ."""
        with self._read_errors(step):
            found = dict(self.manager.item_metadata(step).adapter)
        if misfits := partition.misfits(found, nested(trainable)):
            raise UserError(
                f"adapter {self.folder}/{step} does not fit the model: {'; '.join(misfits)}; give its own base"
            )
        return self._restore_trees(step, adapter=trainable)["adapter"]

    def _restore_trees(self, step: int, **trees) -> dict:
        """-> what was saved under these names, laid out as the given trees."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def wanted(leaf):  # without a layout it goes to one device: Orbax would ask for the devices that saved it
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

        shapes = {name: nested(jax.tree.map(wanted, tree)) for name, tree in trees.items()}
        found = self._read(step, **{name: ocp.args.StandardRestore(shape) for name, shape in shapes.items()})
        leaves = {name: partition.named_leaves(found[name]) for name in trees}
        return {
            name: jax.tree_util.tree_map_with_path(
                lambda path, _, own=leaves[name]: own[partition.path_name(path)], tree
            )
            for name, tree in trees.items()
        }

    def _read(self, step: int, **items):
        with self._read_errors(step):
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if reason := bucket.explain(error.__cause__ or error):
                raise UserError(f"checkpoint {self.folder}/{step} cannot be read: {reason}") from error
            if not isinstance(error, OSError | ValueError | KeyError | TypeError | AttributeError):
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"checkpoint {self.folder}/{step} cannot be read ({reason}); remove that folder to go on from the one before"
            ) from error

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full or read-only disk -> UserError, which says what is safe."""
        try:
            yield
        except Exception as error:
            if reason := bucket.explain(error):
                raise UserError(f"checkpoint in {self.folder} could not be written: {reason}") from error
            text = f"{error} {error.__cause__ or ''}"
            signs = [sign for sign in DISK_SIGNS if sign in text]
            if not signs:
                raise
            last = self.latest()
            kept = "no checkpoint was written before" if last is None else f"the checkpoint of step {last} is whole"
            raise UserError(
                f"checkpoint in {self.folder} could not be written ({signs[0]}); {kept}; make room and run again"
            ) from error
