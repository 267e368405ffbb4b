"""The LLaMA-style decoder in Flax Linen: embedding, scanned blocks, norm, and a head that is handed out, not applied.

B batch, T query length, S key length, N heads, K kv heads, G = N/K, H head_dim, D embed, F mlp, V vocab, R rank.

The decoder returns the last hidden states and the head's matrix. Whoever calls decides for which tokens logits are
worth their memory: the objective takes chunks of the trained tokens, generation the last token of a row.
What differs from layer to layer beside the weights goes through the scan as one tree, `own_of_layers`.
Left out on purpose: positions other than rotary, mixtures of experts.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.adapters.lora import LayerScalars, LoraConfig
from lowrank.families.config import ModelConfig
from lowrank.model.attention import Attention, Cache, RMSNorm, turns
from lowrank.model.kernels import AttentionMask, causal_mask, suits
from lowrank.model.products import KEPT, rows_of
from lowrank.model.projection import project
from lowrank.parallel.mesh import constrain

REMAT = ("none", "dots", "full")


class MLP(nn.Module):
    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, own: dict, deterministic: bool) -> jax.Array:
        gate = project(self, "gate_proj", ("embed", "mlp"), x, own, deterministic)
        up = project(self, "up_proj", ("embed", "mlp"), x, own, deterministic)
        inner = nn.silu(gate.astype(jnp.float32)) * up  # rounded once
        inner = constrain(inner.astype(self.dtype), "batch", "length", "mlp")
        gain = 1 / math.sqrt(2 * self.config.layers)  # as in attention
        return project(self, "down_proj", ("mlp", "embed"), inner, own, deterministic, gain)


class Block(nn.Module):
    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    deterministic: bool
    attention: str = "xla"

    @nn.compact
    def __call__(self, carry, slot, rotation, sees, own):
        x, cache = carry
        parts = (self.config, self.lora, self.dtype, self.param_dtype)
        norm = lambda name: RMSNorm(self.config.norm_eps, self.param_dtype, name=name)  # noqa: E731
        with jax.named_scope("attention"):
            y, cache = Attention(*parts, self.attention, name="self_attn")(
                norm("input_layernorm")(x), cache, slot, rotation, sees, own, self.deterministic
            )
            x = constrain(x + y, "batch", "length", None)
        with jax.named_scope("mlp"):
            y = MLP(*parts, name="mlp")(norm("post_attention_layernorm")(x), own, self.deterministic)
            x = constrain(x + y, "batch", "length", None)
        return (x, cache), None


def own_of_layers(config: ModelConfig, lora: LoraConfig | None) -> dict:
    """What each layer has for itself alone, every leaf [layers]: its `window`, and under each target the adapter's Own.
    Empty where all layers are alike, which leaves no trace in the program."""
    own = {"window": jnp.asarray(config.windows, jnp.int32)} if config.windows else {}
    return own | lora.layer_scalars(config.layers) if lora is not None and lora.uneven else own


class Table(nn.Module):
    """One matrix under a name of its own: the embedding or the head."""

    leaf: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(1 / math.sqrt(self.shape[self.axes.index("embed")]))  # logits of about 1
        return self.param(self.leaf, nn.with_logical_partitioning(init, self.axes), self.shape, self.param_dtype)


class Decoder(nn.Module):
    """tokens int32 [B, T] -> (hidden [B, T, D] in `dtype`, head [D, V] in `param_dtype`, cache)."""

    config: ModelConfig
    lora: LoraConfig | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"  # as `attend.chosen` gives it; with a cache, or of rows that do not suit, it is "xla"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,  # int32 [B, T], what the rotary angles count
        segment_ids: jax.Array,  # int32 [B, T], 0 for padding
        cache: Cache | None = None,  # bits of keys and values, each [layers, B, K, S, H]
        slot: jax.Array | int = 0,  # the cache's slot of this call's first token
        key_segment_ids: jax.Array | None = None,  # int32 [B, S], of every slot of the cache
        deterministic: bool = True,
        adapters: dict[str, LayerScalars] | None = None,  # of each target; None: as `lora` says
    ):
        c = self.config
        embedding = Table("embedding", (c.vocab, c.embed), ("vocab", "embed"), self.param_dtype, name="embed_tokens")()
        # Looked up where the table lies, then each device gives the others their rows: left to itself, the compiler
        # gathers the table, or all rows on all devices.
        x = rows_of(embedding, constrain(tokens, "group", "length"))
        x = constrain(constrain(x, "group", "length", "embed").astype(self.dtype), "batch", "length", None)
        key_segments = segment_ids if key_segment_ids is None else key_segment_ids
        attention = self.attention if cache is None and suits(self.attention, tokens.shape[1]) else "xla"
        slots = slot + jnp.arange(tokens.shape[1])
        whole = None if attention.startswith("splash") else causal_mask(slots, segment_ids, key_segments)
        sees = AttentionMask(segment_ids, whole)

        block = Block
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(KEPT) if self.remat == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.lora, self.dtype, self.param_dtype, deterministic, attention, name="layers")
        own = own_of_layers(c, self.lora) | (adapters or {})
        if cache is not None:
            own["layer"] = jnp.arange(c.layers)
        (x, cache), _ = layers((x, cache), slot, turns(c, positions), sees, own)

        hidden = RMSNorm(c.norm_eps, self.param_dtype, name="norm")(x)
        if c.tied_head:
            return hidden, embedding.T, cache
        return (
            hidden,
            Table("kernel", (c.embed, c.vocab), ("embed", "vocab"), self.param_dtype, name="lm_head")(),
            cache,
        )


def init(model: Decoder, key: jax.Array) -> dict:
    """Fresh variables, `{"params": …, "lora": …}`, as plain trees. Under jit, what is not used is not computed."""
    return nn.meta.unbox(_init_boxed(model, key))


def abstract(model: Decoder) -> tuple[dict, dict]:
    """The variables' ShapeDtypeStructs and their logical axes (tuples), without computing anything."""
    boxed = jax.eval_shape(lambda: _init_boxed(model, jax.random.key(0)))
    axes = jax.tree.map(
        lambda leaf: tuple(leaf.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    return nn.meta.unbox(boxed), axes


def _init_boxed(model, key):
    params, lora = jax.random.split(key)
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init({"params": params, "lora": lora}, token, token, token)
