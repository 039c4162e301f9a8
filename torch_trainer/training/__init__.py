"""The arithmetic of one optimizer step."""
