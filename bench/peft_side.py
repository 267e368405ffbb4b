"""PyTorch's side of `against_peft.py`: transformers and PEFT, as somebody who knows them well writes it.

PEFT has its best case. Attention is `sdpa` (fused); AdamW is the fused one; nothing is padded, so no mask is made where a
row is one text; the model holds bfloat16 and, unless `held` says otherwise, the adapter does, too, which is faster than
PEFT's own float32 (whose adapter passes are float32 products) but loses updates of less than 1/256 of a weight. In full
fine-tuning weights are float32 under autocast, as lowrank and transformers' Trainer(bf16=True) have them; with
`held=bfloat16` they are bfloat16 alone. The loss is the one that transformers computes from `labels`.
"""

import contextlib
import math
import pathlib

import measure
import peft
import torch
import transformers
from worker import Work, batch

transformers.logging.disable_progress_bar()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32


def _device(device: str) -> str:
    return {"cpu": "cpu", "gpu": "cuda"}[device]


class Weights:
    """Writes what both sides load."""

    def __init__(self, work: Work):
        self.work = work

    def write(self, fields: dict):
        """A random model of a `config.json`'s fields in folder/base, an adapter whose lora_B is not zero in folder/adapter."""
        torch.manual_seed(0)
        own = {key: value for key, value in fields.items() if key not in ("architectures", "torch_dtype", "model_type")}
        # Logits of about 1, not of 0.02·√embed: else the loss is log(vocab) whatever is computed.
        config = transformers.LlamaConfig(**own, initializer_range=1 / math.sqrt(fields["hidden_size"]))
        with torch.device(_device(self.work.device)):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.work.dtype))
        model.save_pretrained(pathlib.Path(self.work.folder, "base"), max_shard_size="5GB")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
        with torch.no_grad():
            for name, factor in adapted.named_parameters():
                if "lora_B" in name:
                    factor.normal_(0, 0.02)
        adapted.save_pretrained(pathlib.Path(self.work.folder, "adapter"))


class Peft:
    def __init__(self, work: Work):
        self.work, self.on_cpu = work, work.device == "cpu"
        self.device = torch.device(_device(work.device))
        self.clock = measure.clock(self.on_cpu)
        torch.set_num_threads(measure.cores())
        folder, dtype, held = pathlib.Path(work.folder), getattr(torch, work.dtype), getattr(torch, work.held)
        full = work.mode == "full"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=held if full else dtype, attn_implementation=work.attention
        ).to(self.device)
        if not full:
            model = peft.PeftModel.from_pretrained(
                model, folder / "adapter", is_trainable=True, autocast_adapter_dtype=work.held == "float32"
            ).to(self.device)
        # The base's products must be in `dtype`: where it is held wider, that is what autocast is for.
        autocast = full and held != dtype
        self.context = lambda: torch.autocast(self.device.type, dtype) if autocast else contextlib.nullcontext()
        self.model = model
        data = batch(work, model.config.vocab_size)
        self.tokens = torch.tensor(data["tokens"], dtype=torch.long, device=self.device)
        self.learnt, self.positions = (
            torch.tensor(data[name], device=self.device).to(kind)
            for name, kind in (("learnt", torch.bool), ("positions", torch.long))
        )

    def prepare(self) -> dict:
        if self.work.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.model.config.use_cache = False
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.work.learning_rate, weight_decay=0.0, fused=True)
        self.arguments = {"input_ids": self.tokens, "labels": self.tokens.masked_fill(~self.learnt, -100)}
        if self.work.segments > 1:  # by which transformers knows where a segment begins
            self.arguments["position_ids"] = self.positions
        return {"compiling": 0.0}

    def step(self) -> dict:
        start = self.clock()
        with self.context():
            loss = self.model(**self.arguments, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return {"seconds": self.clock() - start, "loss": loss.item()}

    def generate(self) -> dict:
        """-> seconds until the first token, seconds for all others, tokens of each row."""
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # every row has as many tokens
        times, tokens = [], []

        class Streamer:
            def put(_, token):
                times.append(self.clock())
                tokens.append(token)

            def end(_):
                pass

        start = self.clock()
        self.model.generate(
            input_ids=self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=self.work.new_tokens,
            do_sample=False,
            streamer=Streamer(),
        )
        # The prompt is put first.
        rows = torch.stack(tokens[1:], dim=1).tolist()
        return {"prefill": times[1] - start, "decode": times[-1] - times[1], "tokens": rows}

    def regret(self, tokens: list[list[int]]) -> float:
        """By how much the logit of a token of another's greedy continuation is below the greatest, at most, in standard
        deviations of the logits there; 0 where both would have said the same."""
        given = torch.tensor(tokens, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            ids = torch.cat([self.tokens, given], dim=1)[:, :-1]
            logits = self.model(input_ids=ids, logits_to_keep=given.shape[1], use_cache=False).logits.float()
        chosen = logits.gather(-1, given[..., None])[..., 0]
        return ((logits.max(-1).values - chosen) / logits.std(-1)).max().item()

    def ceiling(self, size: int, repeats: int) -> float:
        """Operations a second of the machine's best large product."""
        x = torch.ones((size, size), dtype=getattr(torch, self.work.dtype), device=self.device)
        x @ x
        self._wait()
        best = 0.0
        for _ in range(3):
            start = self.clock()
            for _ in range(repeats):
                x @ x
            self._wait()
            best = max(best, 2 * size**3 * repeats / (self.clock() - start))
        return best

    def _wait(self):
        if not self.on_cpu:
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Of the process, or of the device: what tensors hold, not what the allocator keeps."""
        return measure.process_peak_bytes() if self.on_cpu else torch.cuda.max_memory_allocated()

    def versions(self) -> dict:
        names = (("torch", torch), ("transformers", transformers), ("peft", peft))
        return {"versions": ", ".join(f"{name} {module.__version__}" for name, module in names)}
