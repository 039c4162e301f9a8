"""`python3 -m shared.prepare_data`: shards and their index made from any data, looked through, and looked at."""
