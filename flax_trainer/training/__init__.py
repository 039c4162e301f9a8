"""The arithmetic of one optimizer step: pure functions that know of no device."""
