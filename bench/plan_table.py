"""The table of docs/plan.md: for each model and kind of chip the smallest slice that its step fits, made by `lowrank.plan`.

    python bench/plan_table.py --to=docs/plan              # hours: some 15 programs are compiled; goes on where it stopped
    python bench/plan_table.py --to=docs/plan --write=docs/plan.md      # puts the tables of what is there into that page

Slices are tried from the smallest up, each with a search that stops at the first plan that fits: of the fastest mesh, remat
and micro-batches by estimate, the first whose program the compiler fits. Every plan's numbers are kept in a JSON file; of a
slice that is too small, the reason.
"""

import argparse
import json
import pathlib

import jax

from lowrank import planning
from lowrank.cli import config_file
from lowrank.errors import UserError
from lowrank.planning.chips import CHIPS

CONFIGS = {
    "llama2_7b": ("configs/llama3.py:8b", ["--config.architecture=llama2-7b"]),
    "llama3_8b": ("configs/llama3.py:8b", []),
    "llama3_70b": ("configs/llama3.py:70b", []),
    "llama3_405b": ("configs/llama3.py:405b", []),
}
KINDS = ("v5e", "v6e", "v5p")
BEGIN, END = "<!-- made by bench/plan_table.py -->", "<!-- end -->"
BUDGET = 100  # dollars: what a run was meant to cost


def make_record(model: str, name: str) -> dict:
    """The numbers of the model's plan on the slice `name`, or why the slice is too small."""
    print(f"{model} on {name}", flush=True)
    try:
        result = planning.plan(config_file.read(*CONFIGS[model]), name, search=True, search_fits=1, search_most=4)
    except UserError as error:
        if "is too small" not in str(error):
            raise
        return {"slice": name, "fits": False, "reason": str(error).split(";")[0]}
    return planning.record(result)


def smallest(model: str, kind: str, folder: pathlib.Path, run: bool) -> list[dict]:
    """Records of the slices that were tried; the last one fits, unless none does."""
    records: list[dict] = []
    for topology in CHIPS[kind].topologies:
        file = folder / f"{model}_{kind}_{topology}.json"
        if run and not file.exists():
            file.write_text(json.dumps(make_record(model, f"{kind}:{topology}"), indent=1) + "\n")
        if not file.exists():
            break
        records.append(json.loads(file.read_text()))
        if records[-1]["fits"]:
            break
    return records


def tables(found: dict[tuple[str, str], list[dict]]) -> str:
    fits = {key: records[-1] for key, records in found.items() if records and records[-1]["fits"]}
    lines = [
        "| model | smallest slice | chips | mesh | remat | micro-batches | GB a chip | of | the next smaller |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, r in fits.items():
        mesh = " x ".join(str(r["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
        smaller = found[key][-2] if len(found[key]) > 1 else None
        cells = [r["model"], r["slice"], r["chips"], mesh, r["remat"], r["microbatches"]]
        cells += [f"{r['bytes']['together'] / 1e9:.1f}", f"{r['bytes']['available'] / 1e9:.1f}", too_small(smaller)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| model | slice | s a step: compute | memory | links | estimate | tokens/s | Alpaca epoch: h | $ | 100M tokens: h | $ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in fits.values():
        seconds = r["seconds"]
        likely = seconds["estimate"]
        cells = [r["model"], r["slice"], *(f"{seconds[part]:.2f}" for part in ("compute", "memory", "interconnect"))]
        cells += [f"{likely:.2f}", f"{r['batch_size'] * r['max_length'] / likely:,.0f}"]
        for bill in (bill_of(r, "Alpaca"), bill_of(r, "100M")):
            mark = "**" if bill["dollars"] <= BUDGET else ""
            cells += [f"{bill['hours']:.2f}", f"{mark}{bill['dollars']:,.2f}{mark}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def bill_of(record: dict, part: str) -> dict:
    return next(bill for name, bill in record["at_efficiency"].items() if part in name)


def too_small(record: dict | None) -> str:
    if record is None:
        return "there is none"
    if "reason" in record:
        return record["reason"].split(" on a device")[0].replace(" is too small: a step needs", ":") + ", by hand"
    how = "compiled" if record["compiled"] else "the best candidate"
    return f"{record['slice']}: {how}, {record['excess'] / 1e9:.1f} GB too much"


def verdict(found: dict[tuple[str, str], list[dict]]) -> str:
    """Which rows meet the budget, and which are not there."""
    fits = {key: records[-1] for key, records in found.items() if records and records[-1]["fits"]}
    lines = []
    for part, what in (("Alpaca", "an epoch of Alpaca"), ("100M", "100M tokens")):
        names = {key: f"{key[0]} on {r['slice']}" for key, r in fits.items()}
        over = [names[key] for key, r in fits.items() if bill_of(r, part)["dollars"] > BUDGET]
        kept = f"all {len(fits)}" if not over else f"{len(fits) - len(over)} of {len(fits)}"
        lines.append(f"- {what}: {kept} rows stay under {BUDGET} dollars{'; not ' + ', '.join(over) if over else ''}.")
    missing = [f"{model} on {kind}" for (model, kind), records in found.items() if (model, kind) not in fits]
    if missing:
        lines.append(f"- Not compiled: {', '.join(missing)}.")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/plan"))
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="of chips, to compile for (several runs can go side by side)"
    )
    parser.add_argument(
        "--write", type=pathlib.Path, help="compile nothing; this page gets the tables between its marks"
    )
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    kinds = [] if arguments.write else arguments.kinds.split(",")
    found = {(model, kind): smallest(model, kind, arguments.to, kind in kinds) for kind in KINDS for model in CONFIGS}
    page = tables(found) + "\n\n" + verdict(found)
    print(page)
    if arguments.write:
        text = arguments.write.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        arguments.write.write_text(f"{text[:start]}\n\n{page}\n\n{text[end:]}")


if __name__ == "__main__":
    main()
