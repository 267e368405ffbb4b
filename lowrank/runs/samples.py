"""What the model says while it learns: answers to held-out examples and continuations of `config.sample.prompts`.

Both are greedy and go to `samples.jsonl`.
"""

from lowrank.config import Config
from lowrank.data.examples import Example
from lowrank.data.tokenizer import Tokenizer
from lowrank.files import paths
from lowrank.files.lines import append_line
from lowrank.inference.answers import answers
from lowrank.inference.text import complete, encode_prompt
from lowrank.model.decoder import Decoder

KEPT_ANSWERS = 10  # of each evaluation


def write_answers(
    file: paths.Path,
    step: int,
    model: Decoder,
    variables: dict,
    tokenizer: Tokenizer,
    examples: list[Example],
    config: Config,
) -> float:
    """Answer the first `config.eval.answers` examples -> the share of answers equal to their references."""
    rows = config.train.batch_size // config.train.microbatches
    given = answers(model, variables, tokenizer, examples[: config.eval.answers], rows)
    for prompt, text, reference in given[:KEPT_ANSWERS]:
        append_line(file, {"step": step, "prompt": prompt, "text": text, "reference": reference})
    return sum(text == reference for _, text, reference in given) / len(given)


def write_samples(
    file: paths.Path, step: int, model: Decoder, variables: dict, tokenizer: Tokenizer, config: Config
) -> list[tuple[str, str]]:
    """Continue each sample prompt -> (prompt, text) pairs."""
    prompts = config.sample.prompts
    rows = [encode_prompt(prompt, "", config.data.format, tokenizer) for prompt in prompts]
    texts = complete(model, variables, tokenizer, rows, config.sample.max_new_tokens)
    for prompt, text in zip(prompts, texts, strict=True):
        append_line(file, {"step": step, "prompt": prompt, "text": text})
    return list(zip(prompts, texts, strict=True))
