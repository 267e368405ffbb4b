"""The table of docs/plan.md: for each model and kind of chip the smallest slice that its step fits, made by `lowrank.plan`.

    python bench/plan_table.py --to=docs/plan              # hours: some 15 programs are compiled; goes on where it stopped
    python bench/plan_table.py --to=docs/plan --write=docs/plan.md      # puts the tables of what is there into that page

Slices are tried from the smallest up, each with `--search --search_fits=1`: the fastest mesh, remat and micro-batches by hand
that the compiler then says fits. Every plan's numbers stay in a JSON file; of a slice that is too small, the reason.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from lowrank.planning.chips import CHIPS

CONFIGS = {
    "llama2_7b": ["--config=configs/llama3.py:8b", "--config.architecture=llama2-7b"],
    "llama3_8b": ["--config=configs/llama3.py:8b"],
    "llama3_70b": ["--config=configs/llama3.py:70b"],
    "llama3_405b": ["--config=configs/llama3.py:405b"],
}
KINDS = ("v5e", "v6e", "v5p")
BEGIN, END = "<!-- made by bench/plan_table.py -->", "<!-- end -->"
BUDGET = 100  # dollars: what a run was meant to cost


def command(model: str, name: str) -> list[str]:
    return [*CONFIGS[model], "--topology=" + name, "--search", "--search_fits=1", "--search_most=4"]


def smallest(model: str, kind: str, folder: pathlib.Path, run: bool) -> list[dict]:
    """Records of the slices that were tried, the last of which fits, unless none does."""
    records = []
    for topology in CHIPS[kind].topologies:
        file = folder / f"{model}_{kind}_{topology}.json"
        if run and not file.exists():
            words = [sys.executable, "-m", "lowrank.plan", *command(model, f"{kind}:{topology}"), f"--json={file}.part"]
            print(" ".join(words), flush=True)
            done = subprocess.run(words, capture_output=True, text=True)
            written = pathlib.Path(f"{file}.part")
            if written.exists():
                written.rename(file)
            elif "is too small" in done.stderr:
                reason = done.stderr.strip().splitlines()[-1].removeprefix("error: ").split(";")[0]
                file.write_text(json.dumps({"slice": f"{kind}:{topology}", "fits": False, "reason": reason}) + "\n")
            else:
                sys.exit(done.stdout + done.stderr)
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
        likely = seconds["roofline"] / r["efficiency"]
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
