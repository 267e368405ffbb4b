"""Estimates of a training step in closed form: time as a roofline, bytes over the links, memory. None is measured.

A step takes at least the longest of three: its FLOPs at the chip's peak, its memory traffic at the memory's bandwidth, its
link traffic at the links'. That bounds a machine that overlaps all three perfectly; what a real step reaches of it is the
`efficiency`. Link traffic comes from the compiled program (collectives.py), and from here only to rank candidates before
there is one. Left out: start-up, evaluations, checkpoints, and the host.
"""

import math
from typing import NamedTuple

from lowrank.config import Config
from lowrank.families.config import ModelConfig
from lowrank.model.flops import step_flops, visible_pairs
from lowrank.training.objectives.cross_entropy import CHUNK_TOKENS

# Of the roofline. MaxText publishes 57 % (v5e-256) to 65 % (v5p-128) of the peak for pretraining Llama 2 70B
# (https://github.com/AI-Hypercomputer/maxtext, getting_started/Run_Llama2.md); this code has no such tuning, and no
# measurement on a TPU.
EFFICIENCY = 0.5


class Roofline(NamedTuple):
    """Seconds of one step on one chip, by what bounds them."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(self.seconds)]


class Share(NamedTuple):
    """One device's share of a step, on a mesh of `data` x `fsdp` x `tensor`."""

    config: Config
    architecture: ModelConfig
    data: int
    fsdp: int
    tensor: int

    @property
    def tokens(self) -> int:
        """Token slots of one micro-batch."""
        train = self.config.train
        return train.batch_size // train.microbatches // (self.data * self.fsdp) * self.config.data.max_length

    @property
    def passes(self) -> int:
        """Over the kernels: forward, backward, and the recomputation of remat."""
        return 3 if self.config.remat == "full" else 2

    @property
    def itemsize(self) -> int:
        return 4 if self.config.dtype == "float32" else 2

    @property
    def held_itemsize(self) -> int:
        return 4 if "float32" in (self.config.param_dtype, self.config.dtype) else 2

    @property
    def kernels(self) -> int:
        """Elements of all layers' kernels, on all devices."""
        return self.architecture.layers * sum(math.prod(shape) for shape in self.architecture.projections().values())

    @property
    def table(self) -> int:
        """Elements of the embedding, or of the head, on all devices."""
        return self.architecture.vocab * self.architecture.embed

    @property
    def factors(self) -> int:
        """Elements of lora_a and lora_b, on all devices."""
        a, lora = self.architecture, self.config.lora
        return a.layers * sum(sum(a.projections()[target]) * lora.width(target) for target in lora.targets)


def flops(share: Share) -> float:
    """FLOPs of one device in a step, spread evenly (what tensor parallelism repeats on every device is small)."""
    c = share.config
    step = step_flops(share.architecture, c.adapter, c.train.batch_size, c.data.max_length, c.remat, c.train.mode)
    return step.total / (share.data * share.fsdp * share.tensor)


def memory_traffic(share: Share) -> float:
    """Bytes that a step reads and writes in one device's memory.

    Counted: each pass reads every kernel of a layer (and writes it first, where fsdp gathers it); every projection reads its
    input and writes its output; two norms and two residual sums; attention's scores, written and read in float32 and as
    weights; logits and their gradient, written and read, and the head twice for each chunk. The backward pass counts twice
    for activations.
    """
    a, c = share.architecture, share.config
    kernels = share.kernels / share.tensor * share.itemsize * (3 if share.fsdp > 1 else 1)
    token = sum(map(sum, a.projections().values())) / share.tensor + 8 * a.embed + 3 * a.mlp / share.tensor
    scores = a.heads * visible_pairs(c.data.max_length) / c.data.max_length / share.tensor * 12
    activations = share.tokens * a.layers * (token * share.itemsize + scores) * (share.passes + 1)
    chunks = math.ceil(share.tokens / CHUNK_TOKENS)
    head = 2 * (chunks * share.table * share.itemsize + 2 * share.tokens * a.vocab * 4) / share.tensor
    return c.train.microbatches * (kernels * share.passes + activations + head)


def link_traffic(share: Share) -> float:
    """Bytes that one chip sends in a step: gathered kernels, sums of activations, sums of gradients."""
    a, c = share.architecture, share.config
    fsdp, tensor, replicas = share.fsdp, share.tensor, share.data * share.fsdp
    held = (share.kernels + 3 * share.table) / tensor * share.held_itemsize
    gathers = share.passes * held * (fsdp - 1) / fsdp
    # What the compiler did for Llama 3 8B (4 chips) and 70B (16), to 2 %: forward, o_proj's and down_proj's results are summed in
    # float32, with remat o_proj's again; backward, the gradients with respect to the inputs of the five others in bfloat16.
    terms = 2 * 2 + 2 * (share.passes == 3) + 5
    sums = terms * a.layers * share.tokens * a.embed * share.itemsize * 2 * (tensor - 1) / tensor
    trained = share.factors * share.itemsize if c.adapter else share.kernels * 4
    gradients = trained * 2 * (replicas - 1) / replicas
    return c.train.microbatches * (gathers + sums + gradients)


def arguments(share: Share) -> float:
    """Bytes of base, adapter and optimizer on one device, without the padding to tiles."""
    held = share.kernels + share.table * (1 if share.architecture.tied_head else 2)
    if not share.config.adapter:
        return 12 * held / (share.fsdp * share.tensor)  # in float32, with two moments
    # A factor is cut by fsdp or tensor on one side and by nothing on the other; fsdp alone is an upper bound.
    return held * share.held_itemsize / (share.fsdp * share.tensor) + 12 * share.factors / share.fsdp


def temporaries(share: Share) -> float:
    """Bytes of a device's memory beside the program's arguments: a guess, to leave out what is far too large."""
    a, c = share.architecture, share.config
    token = sum(outputs for _, outputs in a.projections().values()) / share.tensor
    kept = {"full": a.embed, "dots": a.embed + token, "none": 3 * (a.embed + token)}[c.remat]
    saved = a.layers * share.tokens * kept * share.itemsize
    block = 2 * share.kernels / a.layers / share.tensor * share.itemsize * (share.fsdp > 1)
    block += share.tokens * 4 * (token + a.embed) * share.itemsize
    logits = 2 * min(share.tokens, CHUNK_TOKENS) * a.vocab * 4 / share.tensor + share.table / share.tensor * 2
    return saved + block + logits
