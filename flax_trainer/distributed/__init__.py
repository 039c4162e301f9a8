"""How a run uses its devices and processes."""
