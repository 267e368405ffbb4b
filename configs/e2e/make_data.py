"""The E2E NLG challenge as completions: from a restaurant's facts to a sentence about it.

    python configs/e2e/make_data.py --from=FOLDER --to=runs/e2e [--held_out=400]

FOLDER holds `train.txt` and `valid.txt`, lines of `name : The Vaults | Type : pub | …||The Vaults is a pub …`: the data set of
Novikova et al. (2017, CC BY-SA 4.0) in the form in which the LoRA paper used it, to be had in that paper's repository
(github.com/microsoft/LoRA, examples/NLG/data/e2e). Writes `train.jsonl` and `eval.jsonl`, records of prompt and completion.

The held-out records are lines of valid.txt whose facts occur nowhere in train.txt; of the several sentences that there are
for the same facts the first one, so that the examples are independent. What a line's facts are, is its prompt, as it is.
"""

import argparse
import json
import pathlib
import sys


def read(file: pathlib.Path) -> list[tuple[str, str]]:
    """Lines of `facts||sentence` -> pairs; a line that is none ends the script with its number."""
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        facts, bars, sentence = line.partition("||")
        if not bars or not facts.strip() or not sentence.strip():
            sys.exit(f"{file}, line {number} is not facts||sentence: {line[:60]!r}")
        pairs.append((facts.strip(), sentence.strip()))
    return pairs


def held_out(valid: list[tuple[str, str]], train: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first sentence for each of the first `count` facts of `valid` that do not occur in `train`."""
    known = {facts for facts, _ in train}
    first: dict[str, str] = {}
    for facts, sentence in valid:
        if facts not in known:
            first.setdefault(facts, sentence)
    return list(first.items())[:count]


def write(file: pathlib.Path, pairs: list[tuple[str, str]]):
    records = [{"prompt": f"{facts}\n", "completion": sentence} for facts, sentence in pairs]
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records):,} records in {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=pathlib.Path, required=True, help="the folder of the data set")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="the folder to write to")
    parser.add_argument("--held_out", type=int, default=400, help="records to evaluate on [400]")
    arguments = parser.parse_args()
    missing = [name for name in ("train.txt", "valid.txt") if not (arguments.source / name).is_file()]
    if missing:
        sys.exit(f"{arguments.source} has no {' and no '.join(missing)}; --from is the folder of the E2E data set")
    train, valid = read(arguments.source / "train.txt"), read(arguments.source / "valid.txt")
    arguments.to.mkdir(parents=True, exist_ok=True)
    write(arguments.to / "train.jsonl", train)
    write(arguments.to / "eval.jsonl", held_out(valid, train, arguments.held_out))


if __name__ == "__main__":
    main()
