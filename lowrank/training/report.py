"""What a run says of itself before it begins (`--dry_run` stops there) and when it ends."""

import os
import pathlib

import jax

from lowrank.config import Config
from lowrank.training import metrics, partition
from lowrank.training.metrics import human_bytes


def describe_model(config: Config, architecture, mesh, trainable: dict, frozen: dict, optimizer) -> str:
    """The model, the adapter, and what each group costs in parameters and bytes."""
    a = architecture
    lines = [
        f"model      {a.layers} layers, embed {a.embed}, mlp {a.mlp}, heads {a.heads}/{a.kv_heads}, vocab {a.vocab}"
    ]
    if config.adapted:
        lora = config.lora
        lines.append(
            f"adapter    rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g} ({lora.scaling}), "
            f"dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
        )
    opt_state = jax.eval_shape(optimizer.init, trainable)
    groups = (
        ("base", frozen, "frozen"),
        ("adapter" if config.adapted else "model", trainable, "trained"),
        ("optimizer", opt_state, "state"),
    )
    for name, tree, what in groups:
        size = human_bytes(partition.nbytes(tree))
        lines.append(f"{name:<10} {partition.count(tree):>15,} {what:<8} {size:>10}")
    trained, total = partition.count(trainable), partition.count(trainable) + partition.count(frozen)
    held = "float32" if config.train.mode == "full" else config.param_dtype
    return "\n".join(
        [
            *lines,
            f"trainable  {trained:,} of {total:,} parameters = {100 * trained / total:.4g} %",
            f"mesh       data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x tensor {mesh.shape['tensor']} "
            f"({mesh.devices.size} x {mesh.devices.flat[0].device_kind}); computed in {config.dtype}, base held in {held}",
        ]
    )


def describe_data(config: Config, train, held_out, rows: int, fill: float, steps: int) -> str:
    """What is learnt from, and how much of it a step and an epoch are."""
    packed = "packed" if config.data.packing else "one example each"
    batch = config.train.batch_size
    lines = [
        _describe_examples("data", train, config.data.max_length),
        f"rows       {rows:,} an epoch, {packed}, {100 * fill:.1f} % filled",
        f"steps      {steps:,}, each {batch} rows in {config.train.microbatches} micro-batches = "
        f"{batch * config.data.max_length:,} tokens with padding; {rows / batch:.1f} steps an epoch",
    ]
    if held_out:
        lines.insert(1, _describe_examples("held out", held_out, config.data.max_length))
    return "\n".join(lines)


def _describe_examples(name: str, examples, max_length: int) -> str:
    return (
        f"{name:<10} {len(examples.examples):,} examples, {examples.tokens:,} tokens, {examples.trained_tokens:,} trained on; "
        f"{examples.truncated:,} truncated to {max_length}, {examples.dropped:,} dropped with nothing to train on"
    )


def describe_leaves(shapes: dict, mask: dict) -> str:
    """Every leaf: shape, dtype, layout over the mesh, trained or frozen."""
    trained = partition.named_leaves(mask)
    lines = ["", f"{'leaf':<48} {'shape':<20} {'dtype':<9} {'':<8} sharding"]
    for name, leaf in partition.named_leaves(shapes).items():
        spec = ", ".join("x".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in leaf.sharding.spec)
        what = "trained" if trained[name] else "frozen"
        lines.append(f"{name:<48} {leaf.shape!s:<20} {leaf.dtype!s:<9} {what:<8} ({spec})")
    return "\n".join(lines)


def closing(workdir: pathlib.Path, config: Config, tokens: int, steps: int, seconds: float) -> str:
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    losses = {
        name: [line[name] for line in lines if name in line] for name in ("train/loss", "eval/loss", "eval/exact_match")
    }
    shown = [f"{name} {values[0]:.4f} -> {values[-1]:.4f}" for name, values in losses.items() if values]
    adapter = workdir / "checkpoints"
    result = [
        "",
        f"done       {', '.join(shown)}",
        f"trained    {tokens:,} tokens in all; {steps:,} steps in {seconds:.0f} s here",
        f"adapter    {adapter} ({human_bytes(sum(os.path.getsize(p) for p in adapter.rglob('*') if p.is_file()))})",
        f"curves     {workdir / 'curves.png'}",
    ]
    if config.base:
        result.append(f"next       python -m lowrank.generate --base={config.base} --adapter={workdir} --prompt='…'")
    return "\n".join(result)
