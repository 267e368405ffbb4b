"""Other people's files: checkpoints read into our tree of parameters, adapters and merged models written for others."""
