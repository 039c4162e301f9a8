"""Files of models in diffusers' and transformers' layout: found, downloaded, read and written, in numpy alone."""
