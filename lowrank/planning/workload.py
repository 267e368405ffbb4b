"""How much there is to train on, where nobody has the data at hand: one epoch of Alpaca, and round amounts of tokens.

The lengths were measured on 9,229 records of Alpaca's instructions in the `alpaca` format, BOS and EOS included, cut at
1,024: 127.5 tokens an example with Llama 2's tokenizer, 103.2 with Llama 3's. Packed first fit, rows of 512, 1,024 and 2,048
were filled to 95.7, 98.1 and 98.9 % (Llama 3: 96.9, 98.5, 99.2), which 1 - 20 / length follows to half a percent.
"""

import dataclasses

from lowrank.config import Config
from lowrank.families.config import ModelConfig

ALPACA_EXAMPLES = 52_002
ALPACA_TOKENS = {"Llama 2's tokenizer": 127.5, "Llama 3's tokenizer": 103.2}
LARGE_VOCABULARY = 100_000  # Llama 2 has 32,000, Llama 3 128,256


@dataclasses.dataclass(frozen=True)
class Workload:
    """`tokens` in rows that are filled to `fill`."""

    name: str
    tokens: float
    fill: float


def alpaca_epoch(config: Config, architecture: ModelConfig) -> Workload:
    tokenizer = [*ALPACA_TOKENS][architecture.vocab > LARGE_VOCABULARY]
    tokens = ALPACA_EXAMPLES * ALPACA_TOKENS[tokenizer]
    name = f"one epoch of Alpaca ({ALPACA_EXAMPLES:,} examples of {ALPACA_TOKENS[tokenizer]} tokens, {tokenizer})"
    return Workload(name, tokens, fill(config, ALPACA_TOKENS[tokenizer]))


def of_tokens(config: Config, architecture: ModelConfig, tokens: float) -> Workload:
    return Workload(f"{tokens / 1e6:,.4g}M tokens", tokens, alpaca_epoch(config, architecture).fill)


def fill(config: Config, example: float) -> float:
    """Share of a row's slots that hold a token, with examples of about so many tokens."""
    length = config.data.max_length
    return max(0.5, 1 - 20 / length) if config.data.packing else min(1.0, example / length)
