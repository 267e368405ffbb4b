"""The demo: in three minutes on two CPU cores, an adapter teaches the embedded base to follow instructions.

    python -m lowrank.train --config=configs/demo.py --workdir=runs/demo

The base (configs/demo/base, 0.9 M parameters, made by configs/demo_base.py) has read a few million tokens of little
stories and goes on telling when it is asked something in the Alpaca form. The adapter learns to answer, and to stop.
`eval.answers` counts the right answers to 200 instructions about stories and lists that occur nowhere in its training.
"""

import pathlib

import ml_collections

FOLDER = pathlib.Path(__file__).parent / "demo"


def get_config():
    config = ml_collections.ConfigDict()
    config.base = str(FOLDER / "base")
    config.architecture = None
    config.tokenizer = None
    config.init_adapter = None

    config.data = ml_collections.ConfigDict()
    config.data.train = str(FOLDER / "instructions.json")
    config.data.eval = str(FOLDER / "instructions_eval.json")
    config.data.eval_examples = 0
    config.data.format = "alpaca"
    config.data.max_length = 256
    config.data.packing = True
    config.data.shuffle = True
    config.data.seed = None
    config.data.train_on_prompt = False

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.lora.scaling = "standard"

    config.train = ml_collections.ConfigDict()
    config.train.mode = "lora"
    config.train.steps = 200
    config.train.epochs = None
    config.train.batch_size = 16
    config.train.microbatches = 1

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.99
    config.optim.eps = 1e-8

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.dtype = "float32"
    config.param_dtype = "float32"
    config.remat = "dots"
    config.seed = 0

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 100
    config.eval.answers = 200

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100
    config.checkpoint.keep = 2

    config.log = ml_collections.ConfigDict()
    config.log.every = 20
    config.log.tensorboard = False
    config.log.wandb = None

    config.sample = ml_collections.ConfigDict()
    config.sample.every = 0
    config.sample.prompts = ()
    config.sample.max_new_tokens = 64
    return config
