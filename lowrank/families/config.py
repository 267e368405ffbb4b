"""`ModelConfig`: the shape and constants of a LLaMA-style decoder. A family is a set of its values, never a class."""

import dataclasses

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the low rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements, token ids as in the tokenizer."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False
    max_length: int = 2048
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    stored_dtype: str = "bfloat16"  # of the checkpoint's tensors, according to its config.json
    family: str = "llama"  # `model_type` of its config.json; no computation depends on it
    biased: tuple[str, ...] = ()  # the projections with a bias
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary positions
    windows: tuple[int, ...] = ()  # of each layer: how many tokens a query sees, itself included; 0: all

    def projections(self) -> dict[str, tuple[int, int]]:
        """Each projection of a layer -> (input features, output features)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.embed, q),
            "k_proj": (self.embed, kv),
            "v_proj": (self.embed, kv),
            "o_proj": (q, self.embed),
            "gate_proj": (self.embed, self.mlp),
            "up_proj": (self.embed, self.mlp),
            "down_proj": (self.mlp, self.embed),
        }

    def shape_differences(self, other: "ModelConfig") -> list[str]:
        """What gives the arrays of `other` other shapes than this config's, a few words each."""
        fields = ("vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "tied_head", "biased", "qk_norm")
        pairs = [(name, getattr(other, name), getattr(self, name)) for name in fields]
        return [f"{name} is {theirs}, not {ours}" for name, theirs, ours in pairs if theirs != ours]
