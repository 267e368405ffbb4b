"""Other people's architectures: their config.json, sizes and tensor names, all as values of one ModelConfig."""
