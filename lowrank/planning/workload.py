"""How much there is to train on, and what it costs: the configured run, an epoch of Alpaca, round amounts of tokens.

Alpaca's lengths were measured on 9,229 of its instructions in the `alpaca` format, BOS and EOS included, cut at 1,024:
127.5 tokens an example with Llama 2's tokenizer, 103.2 with Llama 3's. Packed first fit, rows of 512, 1,024 and 2,048 were
filled to 95.7, 98.1 and 98.9 % (Llama 3: 96.9, 98.5, 99.2), which 1 - 20 / length follows to half a percent.
"""

import math
from typing import NamedTuple

from lowrank.config import Config
from lowrank.data.files import sources_of
from lowrank.data.tokenizer import load_tokenizer
from lowrank.families.config import ModelConfig
from lowrank.files import paths
from lowrank.runs.inputs import epoch_rows, read_data, steps_over

ALPACA_EXAMPLES = 52_002
LARGE_VOCABULARY = 100_000  # Llama 2 has 32,000, Llama 3 128,256


class Bill(NamedTuple):
    """What training on a workload takes."""

    steps: int
    hours: float
    dollars: float | None  # None where no price is known


class Workload(NamedTuple):
    """So many tokens, in rows that are filled to `fill`, a share of their token slots."""

    name: str
    tokens: float
    fill: float

    def bill(self, slots: int, seconds: float, chips: int, price: float | None) -> Bill:
        """In whole steps of `slots` token slots and `seconds`; `price`: dollars per chip and hour."""
        steps = math.ceil(self.tokens / self.fill / slots - 1e-6)  # tokens made of whole steps may be a rounding above
        hours = steps * seconds / 3600
        return Bill(steps, hours, None if price is None else hours * chips * price)


def list_workloads(config: Config, architecture: ModelConfig, tokens: float | None = None) -> list[Workload]:
    """The configured run (if its data is here, or it states its steps), an epoch of Alpaca, 100M tokens, `tokens`."""
    alpaca = alpaca_epoch(config, architecture)
    amounts = [100e6, tokens] if tokens else [100e6]
    rounded = [Workload(f"{amount / 1e6:,.4g}M tokens", amount, alpaca.fill) for amount in amounts]
    run = configured_run(config, alpaca.fill)
    return [run, alpaca, *rounded] if run else [alpaca, *rounded]


def configured_run(config: Config, fill: float) -> Workload | None:
    """The run over its data, else its steps over rows filled to `fill`; None where neither data nor steps are known."""
    steps, tokenizer = config.train.steps, config.tokenizer or config.base
    named = sources_of(config.data.train)
    if named and tokenizer and all(paths.path(each).exists() for each in (*named, tokenizer)):
        _, train, _ = read_data(config, load_tokenizer(tokenizer))
        rows, fill = epoch_rows(config, train)
        steps = steps_over(rows, config)
        name = f"the configured run over {', '.join(named)}"
    elif steps:
        name = "the configured steps, rows filled as Alpaca's"
    else:
        return None
    return Workload(name, steps * config.train.batch_size * config.data.max_length * fill, fill)


def alpaca_epoch(config: Config, architecture: ModelConfig) -> Workload:
    """One epoch of Alpaca in the tokenizer that the model's vocabulary suggests."""
    llama3 = architecture.vocab > LARGE_VOCABULARY
    length, tokenizer = (103.2, "Llama 3's tokenizer") if llama3 else (127.5, "Llama 2's tokenizer")
    name = f"one epoch of Alpaca ({ALPACA_EXAMPLES:,} examples of {length} tokens, {tokenizer})"
    row = config.data.max_length
    fill = max(0.5, 1 - 20 / row) if config.data.packing else min(1.0, length / row)
    return Workload(name, ALPACA_EXAMPLES * length, fill)
