"""The ablation of docs/rank_ablation.md: which rank is enough, at which rate, on which matrices, at which batch size?

    python configs/e2e/make_data.py --from=FOLDER --to=runs/e2e --held_out=100
    python -m lowrank.sweep --config=configs/rank_ablation.py:ranks --workdir=runs/ablation_ranks
    python -m lowrank.sweep --config=configs/rank_ablation.py:targets --workdir=runs/ablation_targets
    python -m lowrank.sweep --config=configs/rank_ablation.py:batch --workdir=runs/ablation_batch

over the embedded base, or over another one with --config.base=DIR. The data is the E2E NLG challenge, on which the LoRA
paper measured ranks (tables 6 and 18); make_data.py says where it is to be had. Adam's constants are the usual ones, the rate
is constant after ten steps, alpha is 32 for every rank (so the scale is 32 / rank), as in "LoRA Without Regret" (Schulman et al., 2025).
"""

import pathlib

import ml_collections

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def get_config(what="ranks"):
    config = ml_collections.ConfigDict()
    config.base = str(pathlib.Path(__file__).parent / "demo" / "base")

    config.data = ml_collections.ConfigDict()
    config.data.train = "runs/e2e/train.jsonl"
    config.data.eval = "runs/e2e/eval.jsonl"
    config.data.format = "completion"
    config.data.max_length = 256

    config.lora = ml_collections.ConfigDict()
    config.lora.alpha = 32.0
    config.lora.targets = ATTENTION + MLP

    config.train = ml_collections.ConfigDict()
    config.train.steps = 80
    config.train.epochs = None
    config.train.batch_size = 8

    config.optim = ml_collections.ConfigDict()
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 10

    config.dtype = "float32"
    config.param_dtype = "float32"

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 20

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 40

    config.log = ml_collections.ConfigDict()
    config.log.every = 10

    config.sweep = {
        "ranks": {
            "lora": {"rank": (1, 2, 4, 8, 16, 32, 64)},
            "train": {"mode": ("lora", "full")},
            "optim": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2)},
            "seed": (0, 1, 2),
        },
        "targets": {
            "lora": {"rank": (2, 8), "targets": (ATTENTION, MLP, ATTENTION + MLP)},
            "optim": {"learning_rate": (3e-3, 1e-2)},
            "seed": (0, 1),
        },
        "batch": {
            "lora": {"rank": (4, 64)},
            "train": {"mode": ("lora", "full"), "batch_size": (8, 64)},
            "optim": {"learning_rate": (1e-3, 3e-3, 1e-2)},
        },
    }[what]
    if what == "batch":  # the same examples, in steps of another size
        config.train.steps = None
        config.train.epochs = 0.05
    return config
