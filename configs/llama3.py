"""Llama 3 follows instructions: Alpaca, with an adapter on all seven projections. The argument is the size of the base.

    python -m lowrank.plan --config=configs/llama3.py:8b --topology=v5e:2x4 [--search]
    python -m lowrank.plan --config=configs/llama3.py:70b --topology=v5e:4x4 [--search]
    python -m lowrank.plan --config=configs/llama3.py:405b --topology=v5p:2x2x4 [--search]
    python -m lowrank.train --config=configs/llama3.py:8b --workdir=runs/llama3_8b \
        --config.base=DIR --config.data.train=alpaca_data_cleaned.json

`plan` needs nothing but the `plan` extra. For `train`, `base` is a folder with a base of the named `architecture`, and
`data.train` a JSON list or JSON lines of records with instruction, input (may be empty) and output. With :8b,
--config.architecture=llama3.1-8b is Llama 3.1, and --config.architecture=llama2-7b is Llama 2; with :70b,
--config.architecture=llama3.3-70b is Llama 3.3.

Sources of the values: the recipe (loss on responses only, packed rows, a linear decay, clipping at 1) is that of
configs/alpaca.py, which names its own sources. Adapters on all seven projections, because "LoRA Without Regret"
(Schulman et al., 2025, https://thinkingmachines.ai/blog/lora/) finds that those on the MLP matter most; rank 16 and
alpha 32 are this project's defaults, and so is 8B's learning rate. Those of 70B and 405B are a half and a quarter of it, a
guess: nobody has run them. 32 rows of 1,024 tokens hold about 310 examples of Alpaca (250 with Llama 2's tokenizer), so an
epoch is some 165 steps (210). `mesh.fsdp` splits every kernel over all chips, so that the slice holds the base once;
--search finds the fastest mesh for a slice. On more chips than there are rows: --config.mesh.tensor=8.
"""

import ml_collections

SIZES = {
    "8b": {"architecture": "llama3-8b", "epochs": 3.0, "microbatches": 2, "learning_rate": 2e-4},
    "70b": {"architecture": "llama3-70b", "epochs": 1.0, "microbatches": 1, "learning_rate": 1e-4},
    "405b": {"architecture": "llama3.1-405b", "epochs": 1.0, "microbatches": 1, "learning_rate": 5e-5},
}


def get_config(size="8b"):
    if size not in SIZES:
        raise ValueError(f"there is no size {size}; choose one of {', '.join(SIZES)}")
    own = SIZES[size]
    config = ml_collections.ConfigDict()
    config.base = None  # the folder of the base
    config.architecture = own["architecture"]  # what the base must be; enough for a plan
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
    config.train.epochs = own["epochs"]
    config.train.batch_size = 32
    config.train.microbatches = own["microbatches"]

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = own["learning_rate"]
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
