"""What is computed: the decoder, its attention and projections, and their FLOPs. The only room that imports Flax."""
