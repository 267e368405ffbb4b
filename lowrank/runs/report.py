"""What a run prints before it begins (`--dry_run` stops there) and when it ends."""

import shlex

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import padding_size
from lowrank.config import Config
from lowrank.data.examples import Examples, count_contained
from lowrank.data.files import sources_of
from lowrank.families.config import ModelConfig
from lowrank.files import paths
from lowrank.files.lines import read_lines
from lowrank.formatting import format_bytes
from lowrank.runs.inputs import RunInputs
from lowrank.runs.metrics import best_evaluation, read_evaluations
from lowrank.runs.setup import Step
from lowrank.training import partition


def describe_model(config: Config, architecture: ModelConfig, setup: Step) -> str:
    """The model, the adapter, and the parameters and bytes of base, adapter and optimizer."""
    a, lora, mesh = architecture, config.adapter, setup.mesh
    lines = [
        f"model      {a.layers} layers, embed {a.embed}, mlp {a.mlp}, heads {a.heads}/{a.kv_heads}, vocab {a.vocab}"
    ]
    if lora:
        ranks = f"{describe_ranks(lora, a.layers)} ({lora.scaling})"
        lines.append(f"adapter    {ranks}, dropout {lora.dropout:g}, on {', '.join(lora.targets)}")
    trained, frozen = partition.count(setup.state.trainable), partition.count(setup.frozen)
    trained -= padding_size(lora, a) if lora else 0  # held in memory, but not trained
    for name, count, what, tree in (
        ("base", frozen, "frozen", setup.frozen),
        ("adapter" if lora else "model", trained, "trained", setup.state.trainable),
        ("optimizer", partition.count(setup.state.opt_state), "state", setup.state.opt_state),
    ):
        lines.append(f"{name:<10} {count:>15,} {what:<8} {format_bytes(partition.nbytes(tree)):>10}")
    total, held = trained + frozen, config.param_dtype if lora else "float32"
    axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ("data", "fsdp", "tensor"))
    return "\n".join(
        [
            *lines,
            f"trainable  {trained:,} of {total:,} parameters = {100 * trained / total:.4g} %",
            f"mesh       {axes} ({mesh.devices.size} x {mesh.devices.flat[0].device_kind}); "
            f"computed in {config.dtype}, base held in {held}",
        ]
    )


def describe_ranks(lora: LoraConfig, layers: int) -> str:
    if not lora.uneven:
        return f"rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g}"
    places = [rank for target in lora.targets for rank in lora.layer_ranks(target, layers)]
    ranks = [rank for rank in places if rank]
    scales = [scale for target in lora.targets for scale in lora.layer_scales(target, layers) if scale]
    without = f", none in {len(places) - len(ranks)} of {len(places)} places" if len(ranks) < len(places) else ""
    return f"rank {min(ranks)} to {max(ranks)}{without}, scale {min(scales):g} to {max(scales):g}"


def describe_data(config: Config, inputs: RunInputs) -> str:
    """The examples, and how many rows and tokens a step and an epoch have."""
    rows, steps, batch = inputs.rows, inputs.steps, config.train.batch_size
    packed = "packed" if config.data.packing else "one example each"
    cut = "truncated to" if config.data.overflow == "truncate" else "in chunks of"
    lines = [
        f"{name:<10} {len(found.examples):,} examples ({inputs.format}), {found.tokens:,} tokens, {found.trained_tokens:,} trained on; "
        f"{found.truncated:,} {cut} {config.data.max_length}, {found.dropped:,} dropped with nothing to train on"
        for name, found in (("data", inputs.train), ("held out", inputs.held_out))
        if found
    ]
    lines += _describe_sources(config, inputs.train)
    lines += [
        f"rows       {rows:,} an epoch, {packed}, {100 * inputs.fill:.1f} % filled; a shuffled epoch differs by a few",
        f"steps      {steps:,}, each {batch} rows in {config.train.microbatches} micro-batches = "
        f"{batch * config.data.max_length:,} tokens with padding; {rows / batch:.1f} steps an epoch",
    ]
    warmup = config.optim.warmup(steps)
    if warmup >= steps:
        lines.append(f"note       the warm-up of {warmup} steps does not end within these {steps}")
    return "\n".join(lines + [f"note       {note}" for note in costly(config, inputs)])


def _describe_sources(config: Config, train: Examples) -> list[str]:
    """Of several sources: how many examples each has, and how often a mixture draws them."""
    names, weights = sources_of(config.data.train), config.data.mixture
    lines, count = [], len(train.examples)
    for i, (name, own) in enumerate(zip(names, train.sources, strict=False)):
        drawn = f", read {weights[i] / sum(weights) * count / own:.2f} times an epoch" if weights and own else ""
        lines.append(f"source     {own:,} examples of {name}{drawn}")
    return lines if len(names) > 1 else []


def costly(config: Config, inputs: RunInputs) -> list[str]:
    """What a run would waste or lose without an error: much cut or left out, an evaluation that never happens, one small step."""
    notes, length = [], config.data.max_length
    for name, found in (("training", inputs.train), ("held-out", inputs.held_out)):
        if not found:
            continue
        kept, cut, dropped = len(found.examples), found.truncated, found.dropped
        if cut > 0.1 * kept and config.data.overflow == "truncate":
            share = f"{100 * cut / kept:.0f} % of the {name} examples"
            notes.append(f"{share} are cut to {length} tokens and lose their ends: raise config.data.max_length")
        if dropped > 0.01 * (kept + dropped):
            share = f"{100 * dropped / (kept + dropped):.0f} % of the {name} examples"
            notes.append(
                f"{share} are dropped: their responses are empty, or their prompts fill config.data.max_length"
            )
    if inputs.held_out and (seen := count_contained(inputs.held_out, inputs.train)) > 0.01 * len(
        inputs.held_out.examples
    ):
        notes.append(
            f"{seen:,} of the {len(inputs.held_out.examples):,} held-out examples are training examples, too: eval/loss says "
            "little about new ones"
        )
    if inputs.held_out and not config.eval.every:
        notes.append(
            f"{len(inputs.held_out.examples):,} examples are held out and never evaluated: set config.eval.every"
        )
    if config.train.steps is None and inputs.rows * (config.train.epochs or 0) < config.train.batch_size:
        notes.append(
            f"config.train.epochs={config.train.epochs:g} is less than one batch of {config.train.batch_size} rows, which "
            "repeats examples: lower config.train.batch_size, or set config.train.steps"
        )
    return notes


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
    lines = read_lines(workdir / "metrics.jsonl")
    names = ("train/loss", "eval/loss", "eval/exact_match")
    series = {name: [line[name] for line in lines if name in line] for name in names}
    shown = [f"{name} {values[0]:.4f} -> {values[-1]:.4f}" for name, values in series.items() if values]
    size = format_bytes(sum(paths.sizes(workdir / "checkpoints").values()))
    what, form = ("adapter", "peft") if config.adapter else ("model", "merged")
    result = [
        *before_and_after(workdir),
        "",
        f"done       {', '.join(shown)}",
        *best_line(workdir),
        f"trained    {tokens:,} tokens in all; {steps:,} steps in {seconds:.0f} s here",
        f"{what:<10} {workdir} (as --adapter takes it; checkpoints of {size})",
        f"curves     {workdir / 'curves.png'}",
    ]
    if config.base and config.sample.prompts:
        prompt = config.sample.prompts[0]
        result.append(f"try        {_command('generate', base=config.base, adapter=workdir, prompt=prompt)}")
    to = workdir.name if paths.is_remote(workdir) else workdir  # a folder of this machine
    result.append(f"hand on    {_command('export', workdir=workdir, format=form, to=f'{to}-export')}")
    return "\n".join(result)


def best_line(workdir: paths.Path) -> list[str]:
    """Which step evaluated best, where it is not the last one."""
    losses = read_evaluations(workdir)
    loss, best = best_evaluation(workdir)
    if not losses or best == (last := max(losses)):
        return []
    said = f"best       step {best}, eval/loss {loss:.4f} (the last, step {last}: {losses[last]:.4f}); "
    return [said + ("--step=best takes it" if best else "step 0 is before training: nothing learnt beats it")]


def _command(name: str, **flags) -> str:
    return shlex.join(["python", "-m", f"lowrank.{name}", *(f"--{flag}={value}" for flag, value in flags.items())])


def before_and_after(workdir: paths.Path, count: int = 5) -> list[str]:
    """The first held-out prompts with their first and last answers, if `eval.answers` is set."""
    asked = [record for record in read_lines(workdir / "samples.jsonl") if "reference" in record]
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
