"""The demo's base: a LLaMA of 0.9 M parameters, pretrained from scratch in mode "full" on text that a script makes.

    python configs/demo/make_data.py --to=runs/demo_data
    python -m lowrank.train --config=configs/demo_base.py --workdir=runs/demo_base
    python -m lowrank.export --workdir=runs/demo_base --format=merged --to=runs/demo_base_export

The last folder is what lies in configs/demo/base. docs/demo.md says how long it took and where its loss ended.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.base = None
    config.architecture = "demo"  # model/architecture.py: 4 layers, embed 128, heads 4/2, vocab 1024, tied head
    config.tokenizer = "runs/demo_data"
    config.init_adapter = None

    config.data = ml_collections.ConfigDict()
    config.data.train = "runs/demo_data/pretrain.jsonl"
    config.data.eval = "runs/demo_data/heldout.jsonl"
    config.data.eval_examples = 0
    config.data.format = "text"
    config.data.max_length = 256
    config.data.packing = True
    config.data.shuffle = True
    config.data.seed = None
    config.data.train_on_prompt = False

    config.train = ml_collections.ConfigDict()
    config.train.mode = "full"
    config.train.steps = 3000
    config.train.epochs = None
    config.train.batch_size = 12
    config.train.microbatches = 1

    config.optim = ml_collections.ConfigDict()
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.dtype = "bfloat16"
    config.param_dtype = "float32"
    config.remat = "dots"
    config.seed = 0

    config.eval = ml_collections.ConfigDict()
    config.eval.every = 250
    config.eval.answers = 0

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 250
    config.checkpoint.keep = 1

    config.log = ml_collections.ConfigDict()
    config.log.every = 25
    config.log.tensorboard = False
    config.log.wandb = None

    config.sample = ml_collections.ConfigDict()
    config.sample.every = 250
    config.sample.prompts = (
        "In spring Gus and Sam walked home. Sam is a bear. Gus carries two shells. Sam carries five bells. Gus likes soup. "
        "Sam likes melons.\nWhat does Sam like?\n",
        "The words are figs, toad, honey.\nSay the words backwards.\n",
    )
    config.sample.max_new_tokens = 24
    return config
