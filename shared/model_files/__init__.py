"""Files of models in diffusers' and transformers' layout: finding, downloading, reading and writing them, in numpy alone."""
