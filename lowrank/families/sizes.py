"""Named sizes: `SIZES["llama3-8b"]` is a ModelConfig, for benchmarks, plans and tests without a checkpoint."""

from dataclasses import replace
from typing import Any

from lowrank.families.config import ATTENTION, ModelConfig, RopeScaling

_LLAMA_1 = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, norm_eps=1e-6, stored_dtype="float16")
_LLAMA_2 = replace(_LLAMA_1, norm_eps=1e-5, max_length=4096)
_LLAMA_3 = ModelConfig(
    128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500_000.0, max_length=8192, bos_id=128000, eos_ids=(128001,)
)
_LLAMA_31 = replace(_LLAMA_3, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_length=131072)
_LLAMA_32 = replace(_LLAMA_31, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), tied_head=True)
_SMOLLM2 = ModelConfig(
    49152, 576, 1536, 30, 9, 3, 64, rope_theta=100_000.0, tied_head=True, max_length=8192, bos_id=0, eos_ids=(0,)
)
_MISTRAL = ModelConfig(32768, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6, max_length=32768, family="mistral")
_QWEN2 = ModelConfig(
    151936, 896, 4864, 24, 14, 2, 64, norm_eps=1e-6, rope_theta=1e6, tied_head=True, max_length=32768,
    bos_id=151643, eos_ids=(151643,), family="qwen2", biased=ATTENTION[:3],
)  # fmt: skip
_QWEN3 = ModelConfig(
    151936, 1024, 3072, 28, 16, 8, 128, norm_eps=1e-6, rope_theta=1e6, tied_head=True, max_length=40960,
    bos_id=151643, eos_ids=(151645,), family="qwen3", qk_norm=True,
)  # fmt: skip
_13B: dict[str, Any] = {"embed": 5120, "mlp": 13824, "layers": 40, "heads": 40, "kv_heads": 40}
_70B: dict[str, Any] = {"embed": 8192, "mlp": 28672, "layers": 80, "heads": 64, "kv_heads": 8}
_QWEN_7B: dict[str, Any] = {
    "vocab": 152064, "embed": 3584, "mlp": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "head_dim": 128,
}  # fmt: skip

SIZES: dict[str, ModelConfig] = {
    "llama-7b": _LLAMA_1,
    "llama-13b": replace(_LLAMA_1, **_13B),
    "llama2-7b": _LLAMA_2,
    "llama2-13b": replace(_LLAMA_2, **_13B),
    "llama2-70b": replace(_LLAMA_2, **_70B),
    "llama3-8b": _LLAMA_3,
    "llama3-70b": replace(_LLAMA_3, **_70B),
    "llama3.1-8b": _LLAMA_31,
    "llama3.1-70b": replace(_LLAMA_31, **_70B),
    "llama3.1-405b": replace(_LLAMA_31, embed=16384, mlp=53248, layers=126, heads=128),
    "llama3.2-1b": replace(_LLAMA_32, embed=2048, mlp=8192, layers=16, head_dim=64),
    "llama3.2-3b": replace(_LLAMA_32, embed=3072, mlp=8192, layers=28, heads=24),
    "llama3.3-70b": replace(_LLAMA_31, **_70B, eos_ids=(128001, 128008, 128009)),  # instruct only
    "tinyllama-1.1b": ModelConfig(32000, 2048, 5632, 22, 32, 4, 64),
    "smollm-135m": replace(_SMOLLM2, rope_theta=10_000.0, max_length=2048, stored_dtype="float32"),
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": replace(_SMOLLM2, embed=960, mlp=2560, layers=32, heads=15, kv_heads=5),
    "smollm2-1.7b": replace(_SMOLLM2, embed=2048, mlp=8192, layers=24, heads=32, kv_heads=32, rope_theta=130_000.0),
    "mistral-7b": _MISTRAL,  # v0.3
    "mistral-7b-v0.1": replace(_MISTRAL, vocab=32000, rope_theta=10_000.0, windows=(4096,) * 32),
    "qwen2.5-0.5b": _QWEN2,
    "qwen2.5-1.5b": replace(_QWEN2, embed=1536, mlp=8960, layers=28, heads=12, head_dim=128, max_length=131072),
    "qwen2.5-7b": replace(_QWEN2, **_QWEN_7B, tied_head=False, max_length=131072),
    "qwen3-0.6b": _QWEN3,
    "qwen3-1.7b": replace(_QWEN3, embed=2048, mlp=6144),
    "qwen3-8b": replace(_QWEN3, embed=4096, mlp=12288, layers=36, heads=32, tied_head=False),
    "demo": ModelConfig(1024, 128, 384, 4, 4, 2, 32, tied_head=True, max_length=512),
}
