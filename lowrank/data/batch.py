"""TODO data.batch"""

BATCH_KEYS = ("inputs", "targets", "positions", "segment_ids", "loss_mask")
