"""The checkpoints that Flax writes, and those of PyTorch that it reads."""
