"""What is computed: the decoder, its attention and its adapters. The only place that imports Flax."""
