"""Sources → samples → batches, in numpy and PIL alone."""
