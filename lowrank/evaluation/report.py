"""What an evaluation found, in lines for the console."""

import math

from lowrank.evaluation.loss import Evaluation

FEW = 30  # examples, below which the normal distribution makes an interval too narrow


def describe_examples(result: Evaluation, data: str) -> str:
    settings, examples = result.settings, result.examples
    predicted = "all tokens" if settings.format == "text" or settings.train_on_prompt else "responses"
    return (
        f"format {settings.format}, {settings.max_length} tokens at most, {predicted} predicted (--format, --max_length "
        f"and --train_on_prompt change that)\n"
        f"{data}: {len(examples.examples):,} examples, {examples.trained_tokens:,} tokens to predict; "
        f"{examples.truncated:,} {'are chunks' if settings.overflow == 'chunk' else 'truncated'}, {examples.dropped:,} dropped with nothing to predict"
    )


def describe_losses(result: Evaluation, name: str, other: str | None) -> str:
    """A line for each model, and how they differ."""
    width = max(len(name), len(other or ""))
    lines = [f"{name:<{width}}  {_loss_and_perplexity(*result.loss)}"]
    if other:
        lines.append(f"{other:<{width}}  {_loss_and_perplexity(*result.other_loss)}")
        mean, margin = result.difference
        better = f"{name if mean < 0 else other} is better"
        verdict = better if margin is not None and abs(mean) > margin else "no difference can be told"
        interval = "" if margin is None else f" ± {margin:.6f}, example by example: {verdict}"
        lines.append(f"{name} minus {other}: loss {mean:+.6f}{interval}")
    count = len(result.tokens)
    if count == 1:
        lines.append("note: there is no interval from one example")
    elif count < FEW:
        lines.append(f"note: intervals from {count} examples are too narrow; {FEW} or more make them trustworthy")
    return "\n".join(lines)


def _loss_and_perplexity(mean: float, margin: float | None) -> str:
    if margin is None:
        return f"loss {mean:.6f}  perplexity {_perplexity(mean)}"
    interval = f"{_perplexity(mean - margin)} to {_perplexity(mean + margin)}"
    return f"loss {mean:.6f} ± {margin:.6f}  perplexity {_perplexity(mean)} ({interval})"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4f}" if loss < 30 else f"{math.exp(min(loss, 700)):.3g}"
