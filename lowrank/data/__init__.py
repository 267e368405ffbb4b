"""What a model learns from: records, prompts, token ids, and the endless stream of batches made of them."""
