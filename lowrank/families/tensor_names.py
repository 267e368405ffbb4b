"""Hugging Face's names of the tensors of a base."""

import collections

from lowrank.families.config import ATTENTION, ModelConfig


def hf_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path in `params` -> (Hugging Face's name, its shape there). `{}` in a name is the layer; our leaves stack layers."""
    c = config
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "embed_tokens/embedding": ("model.embed_tokens.weight", (c.vocab, c.embed))
    }

    def add(path: str, shape: tuple[int, ...]) -> None:
        module, leaf = path.rsplit("/", 1)
        name = f"model.layers.{{}}.{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
        table[f"layers/{path}"] = (name, shape)

    add("input_layernorm/scale", (c.embed,))
    for name, (inputs, outputs) in c.projections().items():
        module = f"{'self_attn' if name in ATTENTION else 'mlp'}/{name}"
        add(f"{module}/kernel", (outputs, inputs))
        if name in c.biased:
            add(f"{module}/bias", (outputs,))
    if c.qk_norm:
        add("self_attn/q_norm/scale", (c.head_dim,))
        add("self_attn/k_norm/scale", (c.head_dim,))
    add("post_attention_layernorm/scale", (c.embed,))
    table["norm/scale"] = ("model.norm.weight", (c.embed,))
    if not c.tied_head:
        table["lm_head/kernel"] = ("lm_head.weight", (c.vocab, c.embed))
    return table


def is_ignored(name: str) -> bool:
    """Whether it is the rotary frequencies, which old conversions of Llama store and the config determines."""
    return name.endswith("rotary_emb.inv_freq")


def group_layers(names: list[str]) -> str:
    """List names, the layers of a name grouped: `model.layers.{0,1,2}.mlp.up_proj.weight`."""
    groups = collections.defaultdict(list)
    for name in names:
        before, layers, after = name.partition(".layers.")
        number, _, rest = after.partition(".")
        if number.isdigit():
            groups[before + layers, "." + rest].append(number)
        else:
            groups[name, ""].append("")
    return ", ".join(
        before + (numbers[0] if len(numbers) == 1 else f"{{{','.join(sorted(numbers, key=int))}}}") + after
        for (before, after), numbers in groups.items()
    )
