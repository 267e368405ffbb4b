"""TPU chips: how fast, how much memory, which slices exist; each number with its public source.

Numbers are per chip, in plain units: FLOP/s in bfloat16, bytes, bytes a second. Memory is not the data sheet's but what XLA
lets a program use: the number in its message when a program is too large (libtpu 0.0.42).
Left out: v4, which ahead-of-time compilation sees as two devices a chip where a real v4 has one; and GPUs, whose programs
cannot be compiled without one.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """`link` is of one link in one direction. A chip has two links along each dimension of the torus."""

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    topologies: tuple[str, ...]  # the slices that exist, smallest first
    clock: float | None = None  # Hz, of the compiler's cycles; None: not known
    devices: int = 1  # as which JAX sees one chip; the other numbers are those of all of them together
    full_torus: int = 4  # a slice's dimensions are rings if all of them are multiples of this


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

CHIPS = {
    chip.name: chip
    for chip in (
        # https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, 400 GB/s in both directions over 4 ports.
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 400e9 / 8, _2D, 1.503e9, full_torus=16),
        # https://cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1600 GB/s (1640 in older versions), 800 GB/s over 4 ports.
        Chip("v6e", 918e12, int(31.25 * GIB), 1600e9, 800e9 / 8, _2D, 1.751e9, full_torus=16),
        # https://cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 2765 GB/s, 1200 GB/s over 6 ports.
        Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 1200e9 / 12, _3D, 1.751e9),
        # https://cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s, 7380 GB/s, 1200 GB/s over 6 ports; two devices a chip.
        Chip("tpu7x", 2307e12, int(2 * 94.75 * GIB), 7380e9, 1200e9 / 12, _3D, devices=2),
    )
}
