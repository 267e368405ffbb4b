"""What `lowrank.plan` prints: one plan as tables, and the ranked table of a search."""

import dataclasses

from lowrank.formatting import format_bytes
from lowrank.model.flops import step_flops
from lowrank.planning import prices
from lowrank.planning.collectives import totals
from lowrank.planning.plan import Plan
from lowrank.planning.roofline import bill
from lowrank.planning.workload import Workload


def describe(plan: Plan) -> str:
    """Everything of one plan but the money."""
    return "\n\n".join([_heading(plan), _memory(plan), _collectives(plan), _flops(plan)])


def _heading(plan: Plan) -> str:
    a, c, mesh = plan.architecture, plan.config, plan.mesh
    data, fsdp, tensor = mesh.devices.shape
    rows = c.train.batch_size // c.train.microbatches
    adapter = f"rank {c.lora.rank} on {', '.join(c.lora.targets)}" if c.adapter else "none: everything is trained"
    return "\n".join(
        [
            f"model      {c.architecture or c.base}: {a.layers} layers, embed {a.embed}, mlp {a.mlp}, "
            f"heads {a.heads}/{a.kv_heads}, vocab {a.vocab}",
            f"adapter    {adapter}",
            f"slice      {plan.slice.name}, {plan.slice.chips} chip{'s' * (plan.slice.chips > 1)}; mesh data {data} x fsdp {fsdp} x tensor {tensor}",
            f"step       {c.train.batch_size} rows of {c.data.max_length} tokens, {rows} in each of {c.train.microbatches} "
            f"micro-batches; remat {c.remat}; computed in {c.dtype}, base held in {c.param_dtype}",
        ]
    )


def _memory(plan: Plan) -> str:
    memory, available = plan.memory, plan.slice.memory
    chip = _device(plan)
    rows = [
        ("base" if plan.config.adapter else "frozen", memory.base, ""),
        ("adapter" if plan.config.adapter else "model", memory.adapter, "float32"),
        ("optimizer", memory.optimizer, ""),
        ("other", memory.other, "the batch, and what tiles add to all arrays"),
        ("activations", memory.temporaries, "and gathered kernels, gradients: the program's temporaries"),
        ("program", memory.program, ""),
    ]
    if not plan.program:
        rows = [row for row in rows if row[0] not in ("activations", "program")]
    lines = [f"on each {chip}"] + [
        f"  {name:<12}{format_bytes(size):>10}  {what}".rstrip() for name, size, what in rows
    ]
    if plan.fits:
        lines.append(
            f"  {'together':<12}{format_bytes(memory.total):>10}  of {format_bytes(available)}: fits, "
            f"{format_bytes(-plan.excess)} to spare"
        )
    else:
        by = format_bytes(plan.excess)
        lines.append(
            f"  does NOT FIT: {by} more than the {format_bytes(available)} that a program may have on one {chip}"
        )
    return "\n".join(lines)


def _collectives(plan: Plan) -> str:
    if not plan.program:
        return "collectives  unknown: there is no program"
    table = totals(plan.collectives)
    if not table:
        return "collectives  none"
    lines = [f"collectives of a step{'times':>14}{'sent by each':>20}"]
    return "\n".join(
        lines + [f"  {kind:<20}{times:>13,}{format_bytes(sent):>20}" for kind, (times, sent) in table.items()]
    )


def _flops(plan: Plan) -> str:
    c = plan.config
    flops = step_flops(plan.architecture, c.adapter, c.train.batch_size, c.data.max_length, c.remat, c.train.mode)
    backward = "base, backward, without dW" if c.adapter else "base, backward, with dW"
    rows = [
        ("base, forward", flops.base_forward),
        (backward, flops.base_backward),
        ("adapter", flops.adapter),
        ("head and loss", flops.head),
        ("attention", flops.attention),
        ("computed again (remat)", flops.recomputation),
        ("together", flops.total),
    ]
    lines = ["FLOPs of a step on all chips, by hand"]
    lines += [f"  {name:<28}{count / 1e12:>12,.6g} TFLOP{count / flops.total:>7.1%}" for name, count in rows]
    return "\n".join(lines)


def estimate(plan: Plan, workloads: list[Workload], efficiency: float, price: float | None, source: str) -> str:
    """The roofline and the money; `source` says where the price is from."""
    r = plan.roofline
    slots = plan.config.train.batch_size * plan.config.data.max_length
    numbers = "what a device here did just now" if plan.slice.name == "local" else "the chip's published numbers"
    by_hand = "" if plan.program else " (by hand)"
    lines = [
        f"ESTIMATE, not a measurement: a roofline of {numbers}",
        f"  seconds a step: compute {r.compute:.4g}, memory {r.memory:.4g}, interconnect {r.interconnect:.4g}{by_hand}; "
        f"bound by {r.bound}",
        f"  {'':<44}{'roofline':>14}{f'at {efficiency:.0%} of it':>14}",
        f"  {'seconds a step':<44}{r.seconds:>14.4g}{r.seconds / efficiency:>14.4g}",
        f"  {'token slots a second':<44}{slots / r.seconds:>14,.0f}{slots * efficiency / r.seconds:>14,.0f}",
    ]
    for workload in workloads:
        best, likely = (
            bill(workload.tokens, workload.fill, slots, seconds, plan.slice.chips, price)
            for seconds in (r.seconds, r.seconds / efficiency)
        )
        lines.append(f"  {workload.name}: {workload.tokens / 1e6:,.4g}M tokens, {best.steps:,} steps")
        lines.append(f"  {'  hours':<44}{best.hours:>14.4g}{likely.hours:>14.4g}")
        if best.dollars is not None:
            lines.append(f"  {'  dollars':<44}{best.dollars:>14,.2f}{likely.dollars:>14,.2f}")
    return "\n".join([*lines, f"  {source}"] if source else lines)


def price_source(chip: str, price: float | None, given: bool) -> str:
    if price is None:
        return f"no price is known for {chip}: say --price_per_chip_hour"
    if given:
        return f"at {price:g} dollars per chip and hour, as --price_per_chip_hour says"
    return (
        f"at {price:g} dollars per chip and hour: the list price on demand, looked up on {prices.DATE} "
        "(lowrank/parallel/prices.py); check it, or say --price_per_chip_hour"
    )


SEARCH_HEADING = f"  {'':<9}{'data':>5}{'fsdp':>6}{'tensor':>8}{'remat':>7}{'micro':>7}{'seconds':>10}{'bound by':>14}{'on a device':>13}"


def search_row(plan: Plan, rank: int | None) -> str:
    """A line of the ranked table; `rank` is None where it does not fit."""
    data, fsdp, tensor = plan.mesh.devices.shape
    head = "NOT FIT" if rank is None else f"{rank}."
    memory = f"+{format_bytes(plan.excess)}" if rank is None else format_bytes(plan.memory.total)
    return (
        f"  {head:<9}{data:>5}{fsdp:>6}{tensor:>8}{plan.config.remat:>7}{plan.config.train.microbatches:>7}"
        f"{plan.roofline.seconds:>10.4g}{plan.roofline.bound:>14}{memory:>13}"
    )


def _device(plan: Plan) -> str:
    return "chip" if plan.slice.chip.devices == 1 else f"device ({plan.slice.chip.devices} a chip)"


def record(plan: Plan, workloads: list[Workload], efficiency: float, price: float | None) -> dict:
    """The plan's numbers, for a file."""
    c, r = plan.config, plan.roofline
    slots = c.train.batch_size * c.data.max_length
    bills = {
        workload.name: dataclasses.asdict(
            bill(workload.tokens, workload.fill, slots, r.seconds / efficiency, plan.slice.chips, price)
        )
        for workload in workloads
    }
    return {
        "model": c.architecture or c.base,
        "slice": plan.slice.name,
        "chips": plan.slice.chips,
        "mesh": dict(plan.mesh.shape),
        "remat": c.remat,
        "batch_size": c.train.batch_size,
        "microbatches": c.train.microbatches,
        "max_length": c.data.max_length,
        "fits": plan.fits,
        "compiled": plan.program is not None,
        "bytes": dataclasses.asdict(plan.memory) | {"together": plan.memory.total, "available": plan.slice.memory},
        "excess": plan.excess,
        "collectives": {
            kind: {"times": times, "sent": sent} for kind, (times, sent) in totals(plan.collectives).items()
        },
        "seconds": {"compute": r.compute, "memory": r.memory, "interconnect": r.interconnect, "roofline": r.seconds},
        "efficiency": efficiency,
        "price_per_chip_hour": price,
        "at_efficiency": bills,
    }
