"""Pictures trained in a few shapes, none of them cut to a square: `--aspect_buckets`."""
