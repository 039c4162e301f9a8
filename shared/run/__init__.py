"""A run from its folder to its result, around the training itself."""
