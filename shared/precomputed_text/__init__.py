"""What the text encoders make of all captions of a run, made once and kept on disk (`--precompute_text`)."""
