"""Which rank is enough, at which rate? A sweep over the embedded base: some ten minutes on two CPU cores.

    python -m lowrank.sweep --config=configs/rank_sweep.py --workdir=runs/rank_sweep

On your own base and data, with a grid as wide as the memory takes (all members train in one compiled step):

    python -m lowrank.sweep --config=configs/rank_sweep.py --workdir=runs/ranks \
        --config.base=DIR --config.data.train=FILE --config.data.eval=FILE --config.data.max_length=512 \
        --config.sweep.lora.rank="(1,2,4,8,16,32,64)" --config.sweep.optim.learning_rate="(1e-4,3e-4,1e-3)" \
        --config.sweep.seed="(0,1,2)" --config.dtype=bfloat16 --config.param_dtype=bfloat16

`config.sweep` mirrors the config: a tuple stands where the config has one value, and the members are the product.
alpha is the same for every rank, so the scale is 32 / rank: then the best rate is nearly the same for every rank, too
(Schulman et al., "LoRA Without Regret", 2025). Full fine-tuning, whose best rate is about a tenth, joins as a baseline.
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
    config.train.steps = 60
    config.train.epochs = None
    config.train.batch_size = 8
    config.train.microbatches = 1

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 3e-3  # swept, as are rank, mode and seed
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 10
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # members lie over these devices
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.dtype = "float32"
    config.param_dtype = "float32"
    config.remat = "dots"
    config.seed = 0

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 20
    config.eval.answers = 0

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 20
    config.checkpoint.keep = 1

    config.log = ml_collections.ConfigDict()
    config.log.every = 10
    config.log.tensorboard = False
    config.log.wandb = None

    config.sample = ml_collections.ConfigDict()
    config.sample.every = 0
    config.sample.prompts = ()
    config.sample.max_new_tokens = 64

    config.sweep = ml_collections.ConfigDict()
    config.sweep.group_size = 0  # members in one compiled step; 0: chosen from the memory at hand
    config.sweep.at_once = 0  # of these, in the model at one time on each device; 0: chosen likewise
    config.sweep.lora = ml_collections.ConfigDict()
    config.sweep.lora.rank = (1, 4, 16, 64)
    config.sweep.train = ml_collections.ConfigDict()
    config.sweep.train.mode = ("lora", "full")
    config.sweep.optim = ml_collections.ConfigDict()
    config.sweep.optim.learning_rate = (3e-4, 1e-3, 3e-3, 1e-2)
    config.sweep.seed = (0, 1)
    return config
