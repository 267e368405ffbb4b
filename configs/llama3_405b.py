"""Llama 3.1 405B learns to follow Alpaca's instructions.

    python -m lowrank.plan --config=configs/llama3_405b.py --topology=v5p:2x2x4 [--search]
    python -m lowrank.train --config=configs/llama3_405b.py --workdir=runs/llama3_405b \
        --config.base=DIR --config.data.train=alpaca_data_cleaned.json

The first command needs nothing but the `plan` extra. In the second, `base` is a folder with Llama 3.1 405B, to which
`architecture` holds it, and `data.train` a JSON list or JSON lines of records with instruction, input (may be empty)
and output.

Where the values come from: the recipe (learning from responses only, packed rows, a linear decay, clipping at 1) is
that of configs/alpaca.py, which says whose it is. Adapters on all seven projections, because "LoRA Without Regret"
(Schulman et al., 2025, https://thinkingmachines.ai/blog/lora/) finds that those on the MLP matter most; rank 16 and
alpha 32 are this project's defaults. The learning rate is a quarter of 8B's, a guess: nobody has run this. 32 rows of
1,024 tokens hold about 310 examples of Alpaca, so an epoch is some 165 steps. `mesh.fsdp` cuts every kernel over all
chips, so that the base lies in memory once; what is fastest on a slice, --search says. On more chips than there are
rows, --config.mesh.tensor=8.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.base = None  # the folder of the base
    config.architecture = "llama3.1-405b"  # what the base must be; enough for a plan
    config.tokenizer = None  # None: found beside the base
    config.init_adapter = None

    config.data = ml_collections.ConfigDict()
    config.data.train = None  # the file of instructions
    config.data.eval = None
    config.data.eval_examples = 500
    config.data.format = "alpaca"
    config.data.max_length = 1024
    config.data.packing = True
    config.data.shuffle = True
    config.data.seed = None  # None: as `seed`
    config.data.train_on_prompt = False

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.lora.scaling = "standard"
    config.lora.ranks = {}
    config.lora.alphas = {}

    config.train = ml_collections.ConfigDict()
    config.train.mode = "lora"
    config.train.steps = None
    config.train.epochs = 1.0
    config.train.batch_size = 32
    config.train.microbatches = 1

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 5e-5
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 10
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.dtype = "bfloat16"
    config.param_dtype = "bfloat16"
    config.remat = "full"
    config.seed = 0

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 50
    config.eval.answers = 0

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 50
    config.checkpoint.keep = 3

    config.log = ml_collections.ConfigDict()
    config.log.every = 5
    config.log.tensorboard = False
    config.log.wandb = None

    config.sample = ml_collections.ConfigDict()
    config.sample.every = 50
    config.sample.prompts = ("Give three tips for staying healthy.", "What is the capital of France?")
    config.sample.max_new_tokens = 128
    return config
