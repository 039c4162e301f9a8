import os

# transformers is here for its tokenizer alone, and would begin every run with advice to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
