"""Checkpoints as both backends see them: which to keep and to resume, and the files that each reads of the other."""
