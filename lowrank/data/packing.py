"""Examples become rows of one length: packed first-fit, or one example per row with padding.

Both are the same Grain pipeline with another limit of examples per row. Training, evaluation and the count of an epoch's rows
all use it, so they cannot disagree. An example is never split; each has its own segment id, from 1, and positions from 0.
Padding has segment id 0 and examples -1.
"""

import grain
import numpy as np

from lowrank.data.examples import Example

# Rows open at once: Grain emits them all when an example fits into none. Fill of alpaca_9k at 512, Llama 2's tokenizer:
# 16 rows 94.5 %, 32 95.3 %, 64 95.7 %, 128 96.2 %. A resume packs the open rows again (some 10 ms).
OPEN_ROWS = 64
PADDING = {"examples": -1}  # everything else is padded with 0


def arrays(example: Example) -> dict[str, np.ndarray]:
    """The arrays of one example, each [n - 1]; segment ids and positions come with the packing."""
    return {
        "inputs": example.ids[:-1],
        "targets": example.ids[1:],
        "loss_mask": example.loss_mask,
        "examples": np.full_like(example.ids[1:], example.index),
    }


def pack(elements: grain.MapDataset, max_length: int, packing: bool) -> grain.IterDataset:
    """Rows [max_length] of a finite data set of `arrays`, in its order."""
    names = list(elements[0])
    return grain.experimental.FirstFitPackIterDataset(
        elements.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),  # all in memory: no threads
        length_struct=dict.fromkeys(names, max_length),
        padding_struct={name: PADDING.get(name, 0) for name in names},
        meta_features=names[1:],  # segment ids and positions once, not once for each array
        num_packing_bins=OPEN_ROWS if packing else 1,
        max_sequences_per_bin=None if packing else 1,
        shuffle_bins=False,  # the examples are shuffled already
    )


def packed_rows(lengths: np.ndarray, *, max_length: int, packing: bool) -> tuple[int, float]:
    """Rows for examples of so many inputs, in this order, and the share of the rows' inputs that is not padding.

    Counted as `pack` would fill them, which itself takes 170 us an example; a test compares the two.
    """
    count = len(lengths)
    if packing:
        count, free = 0, [max_length] * OPEN_ROWS
        for length in lengths.tolist():
            fits = next((row for row, room in enumerate(free) if length <= room), None)
            if fits is None:  # all open rows are emitted, and the example begins the next ones
                count, fits, free = count + OPEN_ROWS, 0, [max_length] * OPEN_ROWS
            free[fits] -= length
        count += sum(room < max_length for room in free)
    return count, int(lengths.sum()) / (count * max_length)
