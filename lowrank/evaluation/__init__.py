"""How well a model predicts held-out examples."""

from lowrank.evaluation.loss import Estimate, Evaluation, evaluate, write_losses
from lowrank.evaluation.report import describe_examples, describe_losses

__all__ = ["Estimate", "Evaluation", "describe_examples", "describe_losses", "evaluate", "write_losses"]
