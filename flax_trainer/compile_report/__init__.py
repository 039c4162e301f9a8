"""`python3 -m flax_trainer.compile_report`: what a training step needs of a TPU, told by the TPU's compiler alone."""
