"""Making a cache of encoded images and captions, for `--cached_data`."""
