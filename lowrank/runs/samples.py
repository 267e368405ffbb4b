"""What the model says while it learns: answers to held-out examples and continuations of `config.sample.prompts`.

Both are greedy and go to `samples.jsonl`.
"""

from lowrank.config import Config
from lowrank.files import paths
from lowrank.files.lines import append_line
from lowrank.generation.answers import answer_examples
from lowrank.generation.text import complete, encode_prompt
from lowrank.model.decoder import Decoder
from lowrank.runs.inputs import RunInputs

KEPT_ANSWERS = 10  # of each evaluation


def write_answers(
    file: paths.Path, step: int, model: Decoder, variables: dict, inputs: RunInputs, config: Config
) -> float:
    """Answer the first `config.eval.answers` held-out examples -> the share of answers equal to their references."""
    examples = inputs.held_out.examples[: config.eval.answers] if inputs.held_out else []
    given = answer_examples(
        model, variables, inputs.tokenizer, examples, config.train.batch_size // config.train.microbatches
    )
    for prompt, text, reference in given[:KEPT_ANSWERS]:
        append_line(file, {"step": step, "prompt": prompt, "text": text, "reference": reference})
    return sum(text == reference for _, text, reference in given) / len(given)


def write_samples(
    file: paths.Path, step: int, model: Decoder, variables: dict, inputs: RunInputs, config: Config
) -> list[tuple[str, str]]:
    """Continue each sample prompt -> (prompt, text) pairs."""
    prompts = config.sample.prompts
    rows = [encode_prompt(prompt, "", config.data.format, inputs.tokenizer) for prompt in prompts]
    texts = complete(model, variables, inputs.tokenizer, rows, config.sample.max_new_tokens)
    pairs = list(zip(prompts, texts, strict=True))
    for prompt, text in pairs:
        append_line(file, {"step": step, "prompt": prompt, "text": text})
    return pairs
