"""lowrank's side of `against_peft.py`: the step that `train` compiles, the tokens that `generate` gives.

Base and adapter come through lowrank's own importers. Left out are the loader, the log and the checkpoints of a run: a
step is what is compared, the same object as `train` and `plan` have (`runs/setup.py`).
"""

import dataclasses
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import measure
import numpy as np
from worker import Work, batch

from lowrank.adapters.config import LoraConfig
from lowrank.config import Config, DataConfig, TrainConfig
from lowrank.data.batch import Batch, to_devices
from lowrank.generation.decode import Sampling, generate_ids
from lowrank.parallel import compiling
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.runs.setup import abstract_step
from lowrank.training import partition
from lowrank.training.objectives import cross_entropy as objective
from lowrank.training.optimizer import OptimConfig
from lowrank.training.step import init_state
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params
from lowrank.weights.peft import read_peft


class Lowrank:
    def __init__(self, work: Work):
        self.work, self.on_cpu = work, work.device == "cpu"
        if (jax.default_backend() == "cpu") != self.on_cpu:
            raise SystemExit(f"--device={work.device}, but JAX has found {jax.devices()[0].device_kind}")
        self.clock = measure.clock(self.on_cpu)
        folder = pathlib.Path(work.folder)
        base, lora, factors = read_base(folder / "base"), None, None
        if work.mode != "full":
            factors, lora, _ = read_peft(folder / "adapter", base.config.layers)
        self.mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
        self.architecture = base.config
        self.config = Config(
            data=DataConfig(max_length=work.length),
            lora=lora or LoraConfig(),
            train=TrainConfig(steps=1, batch_size=work.rows, mode="full" if work.mode == "full" else "lora"),
            optim=OptimConfig(learning_rate=work.learning_rate),
            dtype=work.dtype,
            param_dtype=work.dtype,
            remat=work.remat,
        )
        setup = abstract_step(self.config, base.config, self.mesh, 1)
        self.model, shapes = setup.model, setup.shapes
        variables = {"params": load_params(base, shapes["params"])}
        if lora:
            layout = jax.tree.map(lambda leaf: leaf.sharding, shapes["lora"])
            variables["lora"] = jax.tree.map(mesh_lib.put, factors, layout)
        self.variables = jax.block_until_ready(variables)

    def prepare(self, microbatches: int = 1) -> dict:
        """Compile the step -> CPU seconds of it, and the bytes it works with beside its arguments, as the compiler says.
        The variables are the step's from then on."""
        work = self.work
        train = dataclasses.replace(self.config.train, microbatches=microbatches)
        setup = abstract_step(dataclasses.replace(self.config, train=train), self.architecture, self.mesh, 1)
        trainable, self.frozen = partition.split(self.variables, setup.mask)
        self.state = init_state(setup.optimizer, trainable, jax.random.key(0), setup.state)
        self.variables = None  # the step donates its state
        data = batch(work, self.model.config.vocab)
        learnt = np.roll(data["learnt"], -1, axis=1)
        arrays = Batch(
            inputs=data["tokens"],
            targets=np.roll(data["tokens"], -1, axis=1),
            positions=data["positions"],
            segment_ids=data["segment_ids"],
            loss_mask=learnt,
        )
        self.batch = to_devices(arrays, self.mesh)
        start = time.process_time()
        with jax.set_mesh(self.mesh):
            self.compiled = compiling.compile_for(setup.function, self.state, self.frozen, self.batch)
        temporaries = self.compiled.memory_analysis().temp_size_in_bytes
        return {"compiling": time.process_time() - start, "temporaries": temporaries}

    def step(self) -> dict:
        start = self.clock()
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, self.frozen, self.batch))
        return {"seconds": self.clock() - start, "loss": float(metrics.loss)}

    def generate(self) -> dict:
        """-> seconds until the first token, seconds for all others, tokens of each row."""
        prompts = batch(self.work, self.model.config.vocab)["tokens"].tolist()
        start, times, tokens = self.clock(), [], []
        for token in generate_ids(self.model, self.variables, prompts, self.work.new_tokens, Sampling()):
            times.append(self.clock())
            tokens.append(token.tolist())
        return {"prefill": times[0] - start, "decode": times[-1] - times[0], "tokens": np.transpose(tokens).tolist()}

    def ceiling(self, size: int, repeats: int) -> float:
        """Operations a second of the machine's best large product: float32 accumulation is asked for, as in the model."""
        x = jnp.ones((size, size), self.work.dtype)

        @jax.jit
        def product(a, b):
            return jax.lax.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

        jax.block_until_ready(product(x, x))
        best = 0.0
        for _ in range(3):
            start = self.clock()
            for _ in range(repeats):
                y = product(x, x)
            jax.block_until_ready(y)
            best = max(best, 2 * size**3 * repeats / (self.clock() - start))
        return best

    def chunk(self, tokens: int):
        """How many tokens have logits at one time, in steps that are still to be compiled."""
        objective.CHUNK_TOKENS = tokens

    def peak(self) -> int:
        """Of the process, or of the device."""
        return measure.process_peak_bytes() if self.on_cpu else jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def versions(self) -> dict:
        device = measure.processor() if self.on_cpu else jax.devices()[0].device_kind
        versions = f"Python {platform.python_version()}, jax {jax.__version__}"
        return {"device": device, "versions": versions, "attention": self.model.attention}
