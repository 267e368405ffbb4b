"""How it learns: the partition, the objective, the optimizer, the step, checkpoints and metrics."""
