"""What `lowrank.plan` prints and writes of its result."""

from lowrank.formatting import format_bytes, format_number
from lowrank.model.flops import step_flops
from lowrank.planning import prices
from lowrank.planning.collectives import totals
from lowrank.planning.plan import Plan, Result, seconds_of
from lowrank.planning.roofline import EFFICIENCY


def describe(result: Result) -> str:
    """The ranked table of a search, then the best plan: its memory, collectives, FLOPs, and the estimated time and cost."""
    parts = [] if result.candidates is None else [_search(result)]
    parts += [
        describe_part(result.best)
        for describe_part in (_heading, _memory, _collectives, _flops, _time)
        if describe_part(result.best)
    ]
    return "\n\n".join([*parts, _estimate(result)])


def _search(result: Result) -> str:
    fitting, count = sum(plan.fits for plan in result.plans), len(result.plans)
    lines = [
        f"{result.candidates} candidates ranked by hand, the best {count} compiled: {fitting} fit, {count - fitting} do not",
        f"  {'':<9}{'data':>5}{'fsdp':>6}{'tensor':>8}{'remat':>7}{'micro':>7}{'seconds':>10}{'bound by':>14}{'on a device':>13}",
    ]
    for rank, plan in enumerate(result.plans, 1):
        data, fsdp, tensor = plan.step.mesh.devices.shape
        head = f"{rank}." if plan.fits else "NOT FIT"
        memory = format_bytes(plan.memory.total) if plan.fits else f"+{format_bytes(plan.excess)}"
        lines.append(
            f"  {head:<9}{data:>5}{fsdp:>6}{tensor:>8}{plan.config.remat:>7}{plan.config.train.microbatches:>7}"
            f"{seconds_of(plan, result.efficiency):>10.4g}{plan.roofline.bound:>14}{memory:>13}"
        )
    return "\n".join(lines)


def _heading(plan: Plan) -> str:
    a, c = plan.architecture, plan.config
    data, fsdp, tensor = plan.step.mesh.devices.shape
    adapter = f"rank {c.lora.rank} on {', '.join(c.lora.targets)}" if c.adapter else "none: everything is trained"
    return (
        f"model      {c.architecture or c.base}: {a.layers} layers, embed {a.embed}, mlp {a.mlp}, "
        f"heads {a.heads}/{a.kv_heads}, vocab {a.vocab}\n"
        f"adapter    {adapter}\n"
        f"slice      {plan.slice.name}, {plan.slice.chips} chip{'s' * (plan.slice.chips > 1)}; "
        f"mesh data {data} x fsdp {fsdp} x tensor {tensor}\n"
        f"step       {c.train.batch_size} rows of {c.data.max_length} tokens, {c.train.batch_size // c.train.microbatches} "
        f"in each of {c.train.microbatches} micro-batches; remat {c.remat}; computed in {c.dtype}, base held in {c.param_dtype}"
    )


def _memory(plan: Plan) -> str:
    memory, available, devices = plan.memory, format_bytes(plan.slice.memory), plan.slice.chip.devices
    chip = "chip" if devices == 1 else f"device ({devices} a chip)"
    rows = [
        ("base" if plan.config.adapter else "frozen", memory.base, ""),
        ("adapter" if plan.config.adapter else "model", memory.adapter, "float32"),
        ("optimizer", memory.optimizer, ""),
        ("other", memory.other, "the batch, and what tiles add to all arrays"),
    ]
    if plan.program:
        what = "and gathered kernels, gradients: the program's temporaries"
        rows += [("activations", memory.temporaries, what), ("program", memory.program, "")]
    if plan.fits:
        rows.append(("together", memory.total, f"of {available}: fits, {format_bytes(-plan.excess)} to spare"))
    lines = [f"on each {chip}"]
    lines += [f"  {name:<12}{format_bytes(size):>10}  {what}".rstrip() for name, size, what in rows]
    if not plan.fits:
        over = format_bytes(plan.excess)
        lines.append(f"  does NOT FIT: {over} more than the {available} that a program may have on one {chip}")
    return "\n".join(lines)


def _collectives(plan: Plan) -> str:
    if not plan.program:
        return "collectives  unknown: there is no program"
    table = totals(plan.collectives).items()
    rows = [f"  {kind:<20}{times:>13,}{format_bytes(sent):>20}" for kind, (times, sent) in table]
    return (
        "\n".join([f"collectives of a step{'times':>14}{'sent by each':>20}", *rows]) if rows else "collectives  none"
    )


def _flops(plan: Plan) -> str:
    c = plan.config
    flops = step_flops(plan.architecture, c.adapter, c.train.batch_size, c.data.max_length, c.remat, c.train.mode)
    rows = {
        "base, forward": flops.base_forward,
        f"base, backward, {'without' if c.adapter else 'with'} dW": flops.base_backward,
        "adapter": flops.adapter,
        "head and loss": flops.head,
        "attention": flops.attention,
        "computed again (remat)": flops.recomputation,
        "together": flops.total,
    }
    lines = ["FLOPs of a step on all chips, by hand"]
    lines += [f"  {name:<28}{count / 1e12:>12,.6g} TFLOP{count / flops.total:>7.1%}" for name, count in rows.items()]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    """The step by the compiler's cycles, part by part."""
    if not (time := plan.time):
        return ""
    whole = time.together
    lines = [
        f"time of a step on one device by the compiler's cycles, at {(plan.slice.chip.clock or 0) / 1e9:.4g} GHz; floor: the same "
        "operations at the chip's published peaks",
        f"  {'':<28}{'seconds':>10}{'share':>8}{'corrected':>11}{'floor':>11}{'TFLOP':>9}{'GB':>10}",
    ]
    lines += [
        f"  {part.name:<28}{part.seconds:>10.4g}{part.seconds / whole.seconds:>8.1%}{part.corrected:>11.4g}{part.floor:>11.4g}"
        f"{format_number(part.flops / 1e12):>9}{format_number(part.bytes / 1e9):>10}"
        for part in (*time.parts, whole)
    ]
    lines.append(
        f"  collectives: {time.hidden:.4g} seconds while something is computed, {time.exposed:.4g} that nothing hides"
    )
    if time.unknown:
        names = ", ".join(f"{name} ({times:,} times)" for name, times in time.unknown.items())
        lines.append(f"  unknown, and in none of these: {names}")
    return "\n".join(lines)


def _estimate(result: Result) -> str:
    """Time and cost at the roofline, and as a real step is taken to be: by the compiler's cycles, or at a share of the roofline."""
    plan, r = result.best, result.best.roofline
    by_cycles = plan.time is not None and result.efficiency is None
    how = "by its cycles" if by_cycles else f"at {result.efficiency or EFFICIENCY:.0%} of it"
    numbers = "what a device here did just now" if plan.slice.name == "local" else "the chip's published numbers"
    lines = [
        f"ESTIMATE, not a measurement: a roofline of {numbers}",
        f"  seconds a step: compute {r.compute:.4g}, memory {r.memory:.4g}, interconnect {r.interconnect:.4g}"
        f"{'' if plan.program else ' (by hand)'}; bound by {r.bound}",
        f"  {'':<44}{'roofline':>14}{how:>14}",
        f"  {'seconds a step':<44}{r.seconds:>14.4g}{result.seconds:>14.4g}",
        f"  {'token slots a second':<44}{plan.slots / r.seconds:>14,.0f}{plan.slots / result.seconds:>14,.0f}",
    ]
    for workload in result.workloads:
        best, likely = result.bill(workload, r.seconds), result.bill(workload)
        lines.append(f"  {workload.name}: {workload.tokens / 1e6:,.4g}M tokens, {best.steps:,} steps")
        lines.append(f"  {'  hours':<44}{best.hours:>14.4g}{likely.hours:>14.4g}")
        if best.dollars is not None and likely.dollars is not None:
            lines.append(f"  {'  dollars':<44}{best.dollars:>14,.2f}{likely.dollars:>14,.2f}")
    price = f"  at {result.price:g} dollars per chip and hour" if result.price is not None else ""
    if not result.is_list_price:
        lines.append(f"{price}, as --price_per_chip_hour says")
    elif price:
        lines.append(
            f"{price}: the list price on demand, looked up on {prices.DATE} (lowrank/planning/prices.py); check it, or say "
            "--price_per_chip_hour"
        )
    elif plan.slice.name != "local":
        lines.append(f"  no price is known for {plan.slice.chip.name}: say --price_per_chip_hour")
    return "\n".join(lines)


def record(result: Result) -> dict:
    """The best plan's numbers, for a JSON file."""
    plan, c, r = result.best, result.best.config, result.best.roofline
    return {
        "model": c.architecture or c.base,
        "slice": plan.slice.name,
        "chips": plan.slice.chips,
        "mesh": dict(plan.step.mesh.shape),
        "remat": c.remat,
        "batch_size": c.train.batch_size,
        "microbatches": c.train.microbatches,
        "max_length": c.data.max_length,
        "fits": plan.fits,
        "compiled": plan.program is not None,
        "bytes": plan.memory._asdict() | {"together": plan.memory.total, "available": plan.slice.memory},
        "excess": plan.excess,
        "collectives": {kind: {"times": n, "sent": sent} for kind, (n, sent) in totals(plan.collectives).items()},
        "seconds": r._asdict() | {"roofline": r.seconds, "estimate": result.seconds},
        "cycles": _time_record(plan),
        "price_per_chip_hour": result.price,
        "efficiency": result.efficiency,
        "at_efficiency": {workload.name: result.bill(workload)._asdict() for workload in result.workloads},
    }


def _time_record(plan: Plan) -> dict | None:
    if not (time := plan.time):
        return None
    rows = {part.name: {name: value for name, value in part._asdict().items() if name != "name"} for part in time.parts}
    sums = {"seconds": time.seconds, "corrected": time.corrected, "hidden": time.hidden, "exposed": time.exposed}
    return sums | {"parts": rows, "unknown": time.unknown}
