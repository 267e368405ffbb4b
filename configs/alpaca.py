"""Alpaca: a 7B base learns to follow instructions, on a TPU VM or a GPU.

    python -m lowrank.train --config=configs/alpaca.py --workdir=runs/alpaca \
        --config.base=DIR --config.data.train=alpaca_data_cleaned.json

`base` is a folder with a LLaMA checkpoint (of Hugging Face or Meta, with its tokenizer), `data.train` a JSON list or JSON
lines of records with instruction, input (may be empty) and output.

Where the values come from: rank, alpha, dropout, targets, learning rate, warm-up, batch and length are those of
alpaca-lora (github.com/tloen/alpaca-lora, `finetune.py` and its README), which made the recipe known: r 8, alpha 16,
dropout 0.05 on q_proj and v_proj (as in the LoRA paper, section 7.1), Adam at 3e-4 with 100 steps of warm-up and a
linear decay, 128 examples a step, 3 epochs, length 256, and 2,000 examples held out. What differs: 500 are
held out (an evaluation is then short); alpaca-lora pads and trains on the prompt too by default, here examples are packed
(32 rows of 512 tokens hold about the 128 examples) and the loss is on the response only, as in the Stanford Alpaca code.
All seven targets learn more at the same rank
(Dettmers et al., 2023; Schulman et al., 2025): --config.lora.targets=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.base = None  # the folder of the base
    config.architecture = None
    config.tokenizer = None  # None: found beside the base
    config.init_adapter = None

    config.data = ml_collections.ConfigDict()
    config.data.train = None  # the file of instructions
    config.data.eval = None
    config.data.eval_examples = 500
    config.data.format = "auto"  # as the fields say
    config.data.max_length = 512
    config.data.packing = True
    config.data.shuffle = True
    config.data.seed = None  # None: as `seed`
    config.data.train_on_prompt = False
    config.data.columns = {}  # what fields are called in the file: {"instruction": "question"}
    config.data.system = None
    config.data.overflow = "truncate"
    config.data.mixture = ()  # weights of several files
    config.data.cache = None  # None: beside the workdir

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q_proj", "v_proj")
    config.lora.scaling = "standard"
    config.lora.init = "default"
    config.lora.ranks = {}  # where they differ: {"down_proj": 32, "q_proj": a rank for each layer}
    config.lora.alphas = {}

    config.train = ml_collections.ConfigDict()
    config.train.mode = "lora"
    config.train.steps = None
    config.train.epochs = 3.0
    config.train.batch_size = 32
    config.train.microbatches = 4

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 100
    config.optim.warmup_ratio = None  # instead of warmup_steps
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
    config.attention = "auto"
    config.remat = "full"
    config.seed = 0

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 100
    config.eval.answers = 0

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100
    config.checkpoint.keep = 3

    config.log = ml_collections.ConfigDict()
    config.log.every = 10
    config.log.tensorboard = False
    config.log.wandb = None

    config.sample = ml_collections.ConfigDict()
    config.sample.every = 100
    config.sample.prompts = ("Give three tips for staying healthy.", "What is the capital of France?")
    config.sample.max_new_tokens = 128
    return config
