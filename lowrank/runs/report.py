"""What a run prints before it begins (`--dry_run` stops there) and when it ends."""

import shlex

import jax

from lowrank.adapters.lora import LoraConfig, padding_size
from lowrank.config import Config
from lowrank.files import lines as lines_lib
from lowrank.files import paths
from lowrank.formatting import format_bytes
from lowrank.runs.inputs import RunInputs
from lowrank.training import partition


def describe_model(config: Config, architecture, mesh, trainable: dict, frozen: dict, optimizer) -> str:
    """The model, the adapter, and the parameters and bytes of base, adapter and optimizer."""
    a = architecture
    lines = [
        f"model      {a.layers} layers, embed {a.embed}, mlp {a.mlp}, heads {a.heads}/{a.kv_heads}, vocab {a.vocab}"
    ]
    if config.adapter:
        lora = config.lora
        lines.append(
            f"adapter    {describe_ranks(lora, a.layers)} ({lora.scaling}), "
            f"dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
        )
    opt_state = jax.eval_shape(optimizer.init, trainable)
    groups = (
        ("base", frozen, "frozen"),
        ("adapter" if config.adapter else "model", trainable, "trained"),
        ("optimizer", opt_state, "state"),
    )
    zeros = padding_size(config.lora, a) if config.adapter else 0  # held in memory, but not trained
    for name, tree, what in groups:
        size = format_bytes(partition.nbytes(tree))
        count = partition.count(tree) - (zeros if name == "adapter" else 0)
        lines.append(f"{name:<10} {count:>15,} {what:<8} {size:>10}")
    trained = partition.count(trainable) - zeros
    total = trained + partition.count(frozen)
    held = "float32" if config.train.mode == "full" else config.param_dtype
    return "\n".join(
        [
            *lines,
            f"trainable  {trained:,} of {total:,} parameters = {100 * trained / total:.4g} %",
            f"mesh       data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x tensor {mesh.shape['tensor']} "
            f"({mesh.devices.size} x {mesh.devices.flat[0].device_kind}); computed in {config.dtype}, base held in {held}",
        ]
    )


def describe_ranks(lora: LoraConfig, layers: int) -> str:
    if not lora.uneven:
        return f"rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g}"
    table = [
        (rank, scale)
        for target in lora.targets
        for rank, scale in zip(lora.layer_ranks(target, layers), lora.layer_scales(target, layers), strict=True)
    ]
    ranks, scales = ([value for value in column if value] for column in zip(*table, strict=True))
    without = f", none in {len(table) - len(ranks)} of {len(table)} places" if len(ranks) < len(table) else ""
    return f"rank {min(ranks)} to {max(ranks)}{without}, scale {min(scales):g} to {max(scales):g}"


def describe_data(config: Config, inputs: RunInputs) -> str:
    """The examples, and how many rows and tokens a step and an epoch have."""
    train, held_out, rows, steps = inputs.train, inputs.held_out, inputs.rows, inputs.steps
    packed = "packed" if config.data.packing else "one example each"
    batch = config.train.batch_size
    lines = [
        _describe_examples("data", train, config.data.max_length),
        f"rows       {rows:,} an epoch, {packed}, {100 * inputs.fill:.1f} % filled; a shuffled epoch differs by a few",
        f"steps      {steps:,}, each {batch} rows in {config.train.microbatches} micro-batches = "
        f"{batch * config.data.max_length:,} tokens with padding; {rows / batch:.1f} steps an epoch",
    ]
    if config.optim.warmup_steps >= steps:
        lines.append(f"note       the warm-up of {config.optim.warmup_steps} steps does not end within these {steps}")
    if held_out:
        lines.insert(1, _describe_examples("held out", held_out, config.data.max_length))
    return "\n".join(lines)


def _describe_examples(name: str, examples, max_length: int) -> str:
    return (
        f"{name:<10} {len(examples.examples):,} examples, {examples.tokens:,} tokens, {examples.trained_tokens:,} trained on; "
        f"{examples.truncated:,} truncated to {max_length}, {examples.dropped:,} dropped with nothing to train on"
    )


def describe_leaves(shapes: dict, mask: dict) -> str:
    """Each leaf's shape, dtype, layout over the mesh, and whether it is trained."""
    trained = partition.named_leaves(mask)
    lines = ["", f"{'leaf':<48} {'shape':<20} {'dtype':<9} {'':<8} sharding"]
    for name, leaf in partition.named_leaves(shapes).items():
        spec = ", ".join("x".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in leaf.sharding.spec)
        what = "trained" if trained[name] else "frozen"
        lines.append(f"{name:<48} {leaf.shape!s:<20} {leaf.dtype!s:<9} {what:<8} ({spec})")
    return "\n".join(lines)


def closing(workdir: paths.Path, config: Config, tokens: int, steps: int, seconds: float) -> str:
    """The losses, the files, and what to do next."""
    lines = lines_lib.read_lines(workdir / "metrics.jsonl")
    names = ("train/loss", "eval/loss", "eval/exact_match")
    series = {name: [line[name] for line in lines if name in line] for name in names}
    shown = [f"{name} {values[0]:.4f} -> {values[-1]:.4f}" for name, values in series.items() if values]
    folder = workdir / "checkpoints"
    size = sum(paths.sizes(folder).values())
    what = "adapter" if config.adapter else "model"
    result = [
        *before_and_after(workdir),
        "",
        f"done       {', '.join(shown)}",
        f"trained    {tokens:,} tokens in all; {steps:,} steps in {seconds:.0f} s here",
        f"{what:<10} {folder} ({format_bytes(size)})",
        f"curves     {workdir / 'curves.png'}",
    ]
    if config.base and config.sample.prompts:
        prompt = config.sample.prompts[0]
        generate = [
            "python",
            "-m",
            "lowrank.generate",
            f"--base={config.base}",
            f"--adapter={workdir}",
            f"--prompt={prompt}",
        ]
        result.append(f"try        {shlex.join(generate)}")
    export = [
        "python",
        "-m",
        "lowrank.export",
        f"--workdir={workdir}",
        f"--format={'peft' if config.adapter else 'merged'}",
    ]
    to = workdir.name if paths.is_remote(workdir) else workdir  # a folder of this machine
    result.append(f"hand on    {shlex.join([*export, f'--to={to}-export'])}")
    return "\n".join(result)


def before_and_after(workdir: paths.Path, count: int = 5) -> list[str]:
    """The first held-out prompts with their first and last answers, if `eval.answers` is set."""
    asked = [record for record in lines_lib.read_lines(workdir / "samples.jsonl") if "reference" in record]
    if not asked:
        return []
    first, last = asked[0]["step"], asked[-1]["step"]
    lines = ["", "held out: what is asked, what the model said at first, and what it says now"]
    before = {record["prompt"]: record["text"] for record in asked if record["step"] == first}
    for record in [record for record in asked if record["step"] == last][:count]:
        prompt = record["prompt"].split("### Instruction:\n")[-1].removesuffix("\n\n### Response:\n")
        right = "(right)" if record["text"] == record["reference"] else f"(wrong: {record['reference']})"
        for name, text in (
            ("asked", prompt.replace("### Input:\n", "")),
            (f"step {first}", before.get(record["prompt"], "")),
            (f"step {last}", f"{record['text']}  {right}"),
        ):
            lines.append(f"{name:<10} {' / '.join(line for line in text.splitlines() if line.strip())}")
        lines.append("")
    return lines[:-1]
