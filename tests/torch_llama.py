"""Tiny random Llamas of `transformers`, saved as it saves them: what the readers and writers are tested against."""

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


def make(*, kv_heads=2, tied=False, layers=3, head_dim=8, dtype=torch.float32, seed=0, **fields):
    """A model of 4 heads, embed 24 (so that heads * head_dim differs from it) and vocab 40."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + (1.0 if "norm" in name else 0.0))  # norms start as all ones
    return model


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def state(model) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def logits(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def add_delta(model, lora, scale) -> None:
    """W += scale * (lora_a @ lora_b).T, in torch's layout, for every target of a `lora` tree."""
    for block, targets in lora["layers"].items():
        for target, factors in targets.items():
            for layer, (a, b) in enumerate(zip(factors["lora_a"], factors["lora_b"], strict=True)):
                weight = model.get_parameter(f"model.layers.{layer}.{block}.{target}.weight")
                with torch.no_grad():
                    weight += torch.tensor(scale * (a @ b).T)
