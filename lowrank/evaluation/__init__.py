"""How well a model predicts held-out examples."""

from lowrank.evaluation.loss import Estimate, Evaluation, evaluate

__all__ = ["Estimate", "Evaluation", "evaluate"]
