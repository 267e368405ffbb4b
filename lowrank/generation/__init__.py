"""Text from a model: decoding with a cache, streaming text, and answers to held-out examples. A run uses it while it learns."""
