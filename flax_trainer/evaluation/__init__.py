"""Losses and images from the weights in training."""
