"""What a step takes in time, and a run in money: a roofline, by hand. Estimates, all of them.

The step's time is at least the largest of three: the operations at the chip's peak, the bytes of its memory at their bandwidth,
the bytes over its links at theirs. That is a bound for a machine that does all three at once and perfectly. What is
said beside it is the same over an `efficiency`, a guess of how much of that a real step reaches.

Bytes over the links come from the compiled program (parallel/collectives.py), or by hand before there is one, to rank
candidates. Left out: the start of a run, its evaluations and saves, and the host.
"""

import dataclasses
import math

from lowrank.config import Config
from lowrank.families.config import ModelConfig
from lowrank.model.flops import step_flops, visible_pairs
from lowrank.training.objectives.cross_entropy import CHUNK_TOKENS

# Of the roofline. MaxText publishes 57 % (v5e-256) to 65 % (v5p-128) of the peak for pretraining Llama 2 70B
# (https://github.com/AI-Hypercomputer/maxtext, getting_started/Run_Llama2.md); this code has no such tuning, and no
# kernel for attention. Nobody has measured it on a TPU.
EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one chip, by what bounds them."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Bill:
    """A run over some tokens: steps are whole, rows are filled to `fill`."""

    steps: int
    hours: float
    dollars: float | None  # None where there is no price


def bill(tokens: float, fill: float, slots: int, seconds: float, chips: int, price: float | None) -> Bill:
    """`slots`: token slots of a step; `seconds` a step takes; `price` of a chip for an hour."""
    steps = math.ceil(tokens / fill / slots - 1e-6)  # what was made of whole steps may come out a rounding above them
    hours = steps * seconds / 3600
    return Bill(steps, hours, None if price is None else hours * chips * price)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of the devices does in a step: `sizes` of the mesh, and the sizes that follow."""

    config: Config
    architecture: ModelConfig
    data: int
    fsdp: int
    tensor: int

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Of one micro-batch, on one device."""
        return self.config.train.batch_size // self.config.train.microbatches // (self.data * self.fsdp)

    @property
    def tokens(self) -> int:
        return self.rows * self.config.data.max_length

    @property
    def passes(self) -> int:
        """Over the kernels: forward, backward, and again with remat."""
        return 3 if self.config.remat == "full" else 2

    @property
    def itemsize(self) -> int:
        return 4 if self.config.dtype == "float32" else 2

    @property
    def held_itemsize(self) -> int:
        return 4 if "float32" in (self.config.param_dtype, self.config.dtype) else 2

    @property
    def layer_kernels(self) -> int:
        """Elements."""
        return sum(inputs * outputs for inputs, outputs in self.architecture.projections().values())

    @property
    def table(self) -> int:
        """Elements of the embedding, or of the head."""
        return self.architecture.vocab * self.architecture.embed


def flops(share: Share) -> float:
    """Of one device in a step: the step's, evenly spread (what tensor parallelism does on every device alike is small)."""
    c = share.config
    step = step_flops(share.architecture, c.adapter, c.train.batch_size, c.data.max_length, c.remat, c.train.mode)
    return step.total / share.devices


def memory_traffic(share: Share) -> float:
    """Bytes that a step reads and writes in one device's memory.

    Counted: each pass reads every kernel of a layer (and writes it first, where fsdp gathers it); every projection reads
    its input and writes its output; two norms and two sums; the scores of attention, written and read in float32 and
    as weights; logits and their gradient, written and read, and the head twice for each chunk. The backward pass counts twice for
    activations.
    """
    a, c = share.architecture, share.config
    microbatches = c.train.microbatches
    kernels = share.layer_kernels * a.layers / share.tensor * share.itemsize * (3 if share.fsdp > 1 else 1)
    token = sum(inputs + outputs for inputs, outputs in a.projections().values()) / share.tensor
    token += 8 * a.embed + 3 * a.mlp / share.tensor
    scores = a.heads * visible_pairs(c.data.max_length) / c.data.max_length / share.tensor * 12
    activations = share.tokens * a.layers * (token * share.itemsize + scores) * (share.passes + 1)
    chunks = math.ceil(share.tokens / CHUNK_TOKENS)
    head = 2 * (chunks * share.table * share.itemsize + 2 * share.tokens * a.vocab * 4) / share.tensor
    return microbatches * (kernels * share.passes + activations + head)


def link_traffic(share: Share) -> float:
    """Bytes that a step sends from one chip, before there is a program to ask: gathers, sums of activations and gradients."""
    a, c = share.architecture, share.config
    fsdp, tensor, shards = share.fsdp, share.tensor, share.data * share.fsdp
    held = (share.layer_kernels * a.layers + 3 * share.table) / tensor * share.held_itemsize
    gathers = share.passes * held * (fsdp - 1) / fsdp
    # What the compiler did for Llama 3 8B (4 chips) and 70B (16), to 2 %: forward, o_proj's and down_proj's results are summed in
    # float32, with remat o_proj's again; backward, the gradients with respect to the inputs of the five others in bfloat16.
    sums = 2 * 2 + 2 * (share.passes == 3) + 5
    sums *= a.layers * share.tokens * a.embed * share.itemsize * 2 * (tensor - 1) / tensor
    trained = _adapter(share) * share.itemsize if c.adapter else share.layer_kernels * a.layers * 4
    gradients = trained * 2 * (shards - 1) / shards
    return c.train.microbatches * (gathers + sums + gradients)


def arguments(share: Share) -> float:
    """Bytes of base, adapter and optimizer on one device; what tiles add is not in it."""
    a = share.architecture
    held = share.layer_kernels * a.layers + share.table * (1 if a.tied_head else 2)
    if not share.config.adapter:
        return 12 * held / (share.fsdp * share.tensor)  # in float32, with two moments
    # The factors lie over fsdp or tensor on one side, over nothing on the other: as if over fsdp alone, to be safe.
    return held * share.held_itemsize / (share.fsdp * share.tensor) + 12 * _adapter(share) / share.fsdp


def _adapter(share: Share) -> int:
    """Elements of lora_a and lora_b."""
    a, lora = share.architecture, share.config.lora
    return a.layers * sum(sum(a.projections()[target]) * lora.width(target) for target in lora.targets)


def temporaries(share: Share) -> float:
    """Bytes of a device's memory beside the program's arguments: a guess, to leave out what is far too large."""
    a, c = share.architecture, share.config
    token = sum(outputs for _, outputs in a.projections().values()) / share.tensor
    kept = {"full": a.embed, "dots": a.embed + token, "none": 3 * (a.embed + token)}[c.remat]
    saved = a.layers * share.tokens * kept * share.itemsize
    block = 2 * share.layer_kernels / share.tensor * share.itemsize * (share.fsdp > 1)
    block += share.tokens * 4 * (token + a.embed) * share.itemsize
    logits = 2 * min(share.tokens, CHUNK_TOKENS) * a.vocab * 4 / share.tensor + share.table / share.tensor * 2
    return saved + block + logits
