"""The LLaMA-style decoder in Flax Linen: embedding, scanned blocks, norm, and a head that is returned, not applied.

B batch, T query length, S key length, N heads, K kv heads, G = N/K, H head_dim, D embed, F mlp, V vocab, R rank.

The decoder returns the last hidden states and the head's matrix. The caller decides for which tokens logits are worth
their memory: the objective computes chunks of the trained tokens, generation the last token of each row.
Left out on purpose: positions other than rotary, mixtures of experts.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import LayerScalars, layer_scalars
from lowrank.families.config import ModelConfig
from lowrank.model.attention import Attention, Cache, CosSin, LayerInputs, RMSNorm, rotary_cos_sin
from lowrank.model.kernels import AttentionMask, causal_mask, supports_length
from lowrank.model.products import SAVED, embedding_lookup
from lowrank.model.projection import Projection
from lowrank.parallel.mesh import constrain


class MLP(nn.Module):
    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, scalars: dict[str, LayerScalars], deterministic: bool) -> jax.Array:
        parts = (self.config, self.lora, self.dtype, self.param_dtype)
        gate = Projection(*parts, ("embed", "mlp"), name="gate_proj")(x, scalars, deterministic)
        up = Projection(*parts, ("embed", "mlp"), name="up_proj")(x, scalars, deterministic)
        inner = nn.silu(gate.astype(jnp.float32)) * up  # rounded once
        inner = constrain(inner.astype(self.dtype), "batch", "length", "mlp")
        gain = 1 / math.sqrt(2 * self.config.layers)  # as in attention
        return Projection(*parts, ("mlp", "embed"), gain, name="down_proj")(inner, scalars, deterministic)


class Block(nn.Module):
    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    deterministic: bool
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],  # x [B, T, D], the cache of all layers
        slot: jax.Array | int,
        rotary: CosSin,
        mask: AttentionMask,
        layer: LayerInputs,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x, cache = carry
        parts = (self.config, self.lora, self.dtype, self.param_dtype)
        norm = lambda name: RMSNorm(self.config.norm_eps, self.param_dtype, name=name)  # noqa: E731
        with jax.named_scope("attention"):
            y, cache = Attention(*parts, self.attention, name="self_attn")(
                norm("input_layernorm")(x), cache, slot, rotary, mask, layer, self.deterministic
            )
            x = constrain(x + y, "batch", "length", None)
        with jax.named_scope("mlp"):
            y = MLP(*parts, name="mlp")(norm("post_attention_layernorm")(x), layer.adapters, self.deterministic)
            x = constrain(x + y, "batch", "length", None)
        return (x, cache), None


def layer_inputs(
    config: ModelConfig, lora: LoraConfig | None, adapters: dict[str, LayerScalars] | None = None, cached: bool = False
) -> LayerInputs:
    """The LayerInputs of all layers. `adapters` replace the scalars that `lora` stands for."""
    if adapters is None:
        adapters = layer_scalars(lora, config.layers) if lora is not None and lora.uneven else {}
    return LayerInputs(
        adapters,
        window=jnp.asarray(config.windows, jnp.int32) if config.windows else None,
        cache_index=jnp.arange(config.layers) if cached else None,
    )


class Table(nn.Module):
    """A module that is one matrix, `leaf`: the embedding or the head."""

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
    attention: str = "xla"  # of `kernels.choose_backend`; "xla" with a cache or rows of a length that it cannot take

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,  # int32 [B, T], for the rotary angles
        segment_ids: jax.Array,  # int32 [B, T], 0 for padding
        cache: Cache | None = None,
        slot: jax.Array | int = 0,  # the cache's slot of the first token
        key_segment_ids: jax.Array | None = None,  # int32 [B, S], of every slot of the cache
        deterministic: bool = True,
        adapters: dict[str, LayerScalars] | None = None,  # by target; None: as in `lora`
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        c = self.config
        embedding = Table("embedding", (c.vocab, c.embed), ("vocab", "embed"), self.param_dtype, name="embed_tokens")()
        # Each device looks rows up in its part of the table, then they exchange rows: left to itself, the compiler
        # gathers the table, or all rows on all devices.
        x = embedding_lookup(embedding, constrain(tokens, "group", "length"))
        x = constrain(constrain(x, "group", "length", "embed").astype(self.dtype), "batch", "length", None)
        key_segments = segment_ids if key_segment_ids is None else key_segment_ids
        attention = self.attention if cache is None and supports_length(self.attention, tokens.shape[1]) else "xla"
        slots = slot + jnp.arange(tokens.shape[1])
        full = None if attention.startswith("splash") else causal_mask(slots, segment_ids, key_segments)

        block = Block
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(SAVED) if self.remat == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.lora, self.dtype, self.param_dtype, deterministic, attention, name="layers")
        per_layer = layer_inputs(c, self.lora, adapters, cached=cache is not None)
        mask = AttentionMask(segment_ids, full)
        (x, cache), _ = layers((x, cache), slot, rotary_cos_sin(c, positions), mask, per_layer)

        hidden = RMSNorm(c.norm_eps, self.param_dtype, name="norm")(x)
        if c.tied_head:
            return hidden, embedding.T, cache
        head = Table("kernel", (c.embed, c.vocab), ("embed", "vocab"), self.param_dtype, name="lm_head")()
        return hidden, head, cache


def init(model: Decoder, key: jax.Array) -> dict:
    """Fresh variables, `{"params": …, "lora": …}`, as plain trees. Under jit, what is not used is not computed."""
    return nn.meta.unbox(_init_boxed(model, key))


@functools.lru_cache(maxsize=100)  # tracing takes 0.3 s, and a sweep asks twice for each member
def abstract(model: Decoder) -> tuple[dict, dict]:
    """The variables' ShapeDtypeStructs and their logical axes (tuples), without computing anything; not to be changed."""
    boxed = jax.eval_shape(lambda: _init_boxed(model, jax.random.key(0)))
    axes = jax.tree.map(
        lambda leaf: tuple(leaf.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    return nn.meta.unbox(boxed), axes


def _init_boxed(model, key):
    params, lora = jax.random.split(key)
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init({"params": params, "lora": lora}, token, token, token)
