"""Models that look at pictures, for `shared.evaluate`."""
