"""A trained ControlNet measured on held-out data by one command: flags → pictures → figures → JSON and a page."""
