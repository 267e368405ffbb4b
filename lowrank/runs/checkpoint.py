"""Checkpoints of a run, through Orbax and nowhere else: what is trained, the optimizer's state, the place in the data.

A checkpoint is a folder `checkpoints/STEP/` of four items: `adapter` (the trainable leaves under their paths),
`opt_state`, `data` (the loader's position) and `meta`. The trees that come in have holes where the base is, so no
leaf of a base can be in it. Saving is asynchronous and atomic: a folder gets its name when it is whole; in a bucket, where
nothing can be renamed, it gets the object `commit_success.txt` then, and is nothing without it.
"""

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Collection, Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from lowrank.errors import UserError
from lowrank.files import bucket, paths
from lowrank.parallel import distributed
from lowrank.training import partition
from lowrank.training.step import State

EVAL_LOSS = "eval/loss"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
DISK_SIGNS = tuple(map(os.strerror, DISK_ERRORS))  # libraries in C++ pass on the text only


@dataclasses.dataclass
class _KeepSteps(ocp.checkpoint_managers.PreservationPolicy):
    steps: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step in self.steps() for checkpoint in checkpoints]


def nested(tree) -> dict:
    """Any tree -> nested dicts of its leaves by their paths' names, without the holes: what Orbax is given."""
    result: dict = {}
    for name, leaf in partition.named_leaves(tree).items():
        *parents, last = name.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
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
        self.folder = epath.Path(str((workdir / "checkpoints").absolute()))  # which may be one in a bucket
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "adapter": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), best, _KeepSteps(also_keep)]
                ),
                save_decision_policy=policies.FixedIntervalPolicy(1),  # when to save is the loop's decision
                # What a killed run left half written goes; but a reader must not take a running save for that.
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
            return  # the others have no part in this error: they would be waited for, for ever
        try:
            self.wait()
        finally:
            self.manager.close()
            sys.unraisablehook = self._hook

    def _ignore_late_writes(self, unraisable):
        """After a save has failed, each of its other writes reports to an event loop that Orbax has closed already."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def wait(self):
        """Until the last save is on the disk; its failure is raised here."""
        with self._disk_errors():
            self.manager.wait_until_finished()

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: State, data: dict, meta: dict, eval_loss: float | None = None):
        """Start saving; a failure of the save before this one is raised here."""
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
        """UserError if a checkpoint lacks one of its items, or its small ones cannot be read."""
        self._read(step, meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        with self._read_errors(step):
            metadata = self.manager.item_metadata(step)
            missing = [item for item in ("adapter", "opt_state") if not dict(metadata[item] or {})]
            if missing:
                raise ValueError(f"no {' and no '.join(missing)}")

    def forget(self):
        """Remove all checkpoints."""
        for step in self.manager.all_steps():
            (self.folder / str(step)).rmtree()
        self.manager.reload()

    def restore(self, step: int, state: State) -> tuple[State, dict]:
        """-> the state saved at `step`, laid out as `state` (ShapeDtypeStructs) is, its step and key left as they are
        there; the data's position."""
        restored = self._read(
            step,
            adapter=ocp.args.StandardRestore(nested(_abstract(state.trainable))),
            opt_state=ocp.args.StandardRestore(nested(_abstract(state.opt_state))),
            data=ocp.args.JsonRestore(),
        )
        trainable = _fill(state.trainable, restored.adapter)
        opt_state = _fill(state.opt_state, restored.opt_state)
        return State(state.step, trainable, opt_state, state.key), restored.data

    def restore_adapter(self, step: int, trainable: dict) -> dict:
        """-> the trainable tree saved at `step`, laid out as the given one; UserError if their leaves differ."""
        with self._read_errors(step):
            found = dict(self.manager.item_metadata(step).adapter)
        misfits = partition.misfits(found, nested(trainable))
        if misfits:
            raise UserError(
                f"adapter {self.folder}/{step} does not fit the model: {'; '.join(misfits)}; give its own base"
            )
        restored = self._read(step, adapter=ocp.args.StandardRestore(nested(_abstract(trainable))))
        return _fill(trainable, restored.adapter)

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
        """A disk that is full or read-only is the user's to mend: one line, and what is safe."""
        try:
            yield
        except Exception as error:
            text = f"{error} {error.__cause__ or ''}"
            if reason := bucket.explain(error):
                raise UserError(f"checkpoint in {self.folder} could not be written: {reason}") from error
            signs = [sign for sign in DISK_SIGNS if sign in text]
            if signs or getattr(error, "errno", None) in DISK_ERRORS:
                last = self.latest()
                kept = (
                    f"the checkpoint of step {last} is whole"
                    if last is not None
                    else "no checkpoint was written before"
                )
                reason = signs[0] if signs else os.strerror(error.errno)  # type: ignore[attr-defined]
                raise UserError(
                    f"checkpoint in {self.folder} could not be written ({reason}); {kept}; make room and run again"
                ) from error
            raise


def _abstract(tree):
    """Where no layout is asked for, all on one device: Orbax would ask for the devices that saved it."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), tree)


def _fill(tree, values: dict):
    """`tree` with its leaves replaced by those of the nested dicts, by path."""
    by_name = partition.named_leaves(values)
    return jax.tree_util.tree_map_with_path(lambda path, _: by_name[partition.path_name(path)], tree)
