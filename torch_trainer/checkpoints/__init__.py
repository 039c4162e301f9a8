"""The checkpoints that PyTorch writes, and those of Flax that it reads."""
