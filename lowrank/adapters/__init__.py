"""LoRA and its variants, a file for each: configuration, initial values, scales."""
