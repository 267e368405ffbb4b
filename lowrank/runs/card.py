"""The model card of an export: what a stranger has to know to use it and to trust it, from the run's own record.

Only what was recorded or measured is said. Of the data's path only the file's name.
"""

import pathlib
from collections.abc import Sequence

from lowrank.adapters.config import LoraConfig
from lowrank.data.files import sources_of
from lowrank.data.hub_data import NAME
from lowrank.data.prompts import ALPACA, ALPACA_WITH_INPUT
from lowrank.files import hub, paths
from lowrank.runs.report import describe_ranks

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

LOSSES = {"train/loss": "training, a step's own", "eval/loss": "held out", "eval/perplexity": "held-out perplexity"}
PROMPTS = {
    "alpaca": "Prompts need the words it was trained with, without an input\n\n```\n{plain}```\n\nand with one\n\n```\n{given}```",
    "chat": "It was trained on conversations: render them with the tokenizer's chat template.",
    "completion": "It was trained to go on from prompts as they are, after a BOS token.",
    "text": "It was trained on plain texts, each after a BOS token.",
    "tokens": "It was trained on token ids that others had made.",
}


def model_card(
    *, record: dict, lines: list[dict], step: int, lora: LoraConfig | None, trained: int, base: str, export: dict
) -> str:
    """Markdown with the hub's header.

    `record` is the run's config.json, `lines` its metrics, `trained` the number of trained parameters, `base` what to
    load the base by; `export` says name, format ("peft" | "merged"), dtype, difference, tolerance and ends (the ids).
    """
    config, is_peft = record["config"], export["format"] == "peft"
    is_here = paths.is_remote(base) or paths.path(base).exists()
    header = [f"library_name: {'peft' if is_peft else 'transformers'}", "pipeline_tag: text-generation"]
    header += [] if is_here else [f"base_model: {base}"]  # the hub refuses a card whose base_model is a path
    header += ["tags:", *(["- lora"] if lora else []), "- lowrank"]
    data = _name(config["data"]["train"])
    if lora is None:
        origin = f"`{config['architecture']}` from scratch" if config["architecture"] else f"`{base}`"
        summary = f"A full training of {origin} on `{data}`, made with lowrank (JAX)."
    else:
        what = "A LoRA adapter for" if is_peft else "With a LoRA adapter merged into it:"
        summary = f"{what} `{base}`, trained on `{data}` with lowrank (JAX)."
    facts = _facts(record, step, lora, trained, base)
    plain = ALPACA.format(instruction="{instruction}")
    given = ALPACA_WITH_INPUT.format(instruction="{instruction}", input="{input}")
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {export['name']}",
        summary,
        "## Training",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]),
        f"## Losses\n\n{_losses(lines, step)}",
        f"## Prompts\n\n{PROMPTS[config['data']['format']].replace('{plain}', plain).replace('{given}', given)}",
        f"## Loading\n\n{_loading(config, base, lora, export)}",
        "## Verification",
        "Before this folder got its name, every tensor in it was read back and compared, and the float32 logits of fixed "
        f"tokens were compared with the trained model's: the largest difference was {export['difference']:.2g} of the "
        f"largest logit (allowed for {export['dtype']}: {export['tolerance']:g}).",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(record: dict, step: int, lora: LoraConfig | None, trained: int, base: str) -> dict[str, str]:
    c, identity = record["config"], record["identity"]
    data, train, optim = c["data"], c["train"], c["optim"]
    ratio = optim.get("warmup_ratio")  # None also in a run of an older release
    warmup = optim["warmup_steps"] if ratio is None else f"{100 * ratio:g} % of the steps"
    facts = {}
    if not c["architecture"]:
        facts["base"] = f"`{base}`, fingerprint `{identity['base']}`"
    if lora:
        facts["adapter"] = f"{describe_ranks(lora, identity['architecture']['layers'])} ({lora.scaling})"
        facts["targets"] = ", ".join(lora.targets)
        facts["dropout"] = f"{lora.dropout:g}"
        if c["init_adapter"]:
            facts["started from"] = f"another adapter, `{_name(c['init_adapter'])}`"
    facts |= {
        "trained parameters": f"{trained:,}",
        "data": f"`{_name(data['train'])}`, sha256 begins `{identity['data.train']}`",
        "data format": f"{data['format']}, {data['max_length']} tokens at most, "
        f"loss on {'prompts and responses' if data['train_on_prompt'] else 'responses'}"
        if data["format"] != "text"
        else f"text, {data['max_length']} tokens at most",
        **({"tokenizer": "its own, in this folder"} if c["tokenizer"] else {}),
        "steps": f"{step:,} of {train['batch_size']} rows{' of packed examples' if data['packing'] else ''}",
        "optimizer": f"AdamW, learning rate {optim['learning_rate']:g} ({optim['schedule']}, warm-up {warmup}), "
        f"weight decay {optim['weight_decay']:g}, clip norm {optim['clip_norm']:g}",
        "computed in": f"{c['dtype']}, seed {c['seed']}",
        "made with": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return facts


def _name(where: str | Sequence[str]) -> str:
    """Of a path, the last part alone."""
    names = [name if hub.match(name, NAME) else pathlib.Path(name).name for name in sources_of(where)]
    return ", ".join(names)


def _losses(lines: list[dict], step: int) -> str:
    """The first and the last up to the exported step, as they were logged."""
    rows = []
    for name, shown in LOSSES.items():
        logged = [(line["step"], line[name]) for line in lines if name in line and line["step"] <= step]
        if logged:
            cells = " | ".join(f"{loss:.4f} (step {at})" for at, loss in (logged[0], logged[-1]))
            rows.append(f"| {shown} | {cells} |")
    return "\n".join(["| loss | first | last |", "| --- | --- | --- |", *rows]) if rows else "None was logged."


def _loading(config: dict, base: str, lora: LoraConfig | None, export: dict) -> str:
    name, form = export["name"], config["data"]["format"]
    if export["format"] == "merged":
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

```
python -m lowrank.generate --base={name} --format={form} --prompt=TEXT
```"""
    rank = next((rank for rank in VLLM_RANKS if lora and rank >= lora.rank), None)
    vllm = ""
    if rank and lora and not lora.uneven:  # vLLM takes one rank and one alpha for all modules
        vllm = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={name}\n"
    # What ends a trained turn is not always what the base's own generation_config.json says.
    ends = f"\nmodel.generation_config.eos_token_id = {export['ends']}" if form == "chat" else ""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name if config["tokenizer"] else base}")
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}"){ends}
```

```
python -m lowrank.generate --base={base} --adapter={name} --format={form} --prompt=TEXT
{vllm}```"""
