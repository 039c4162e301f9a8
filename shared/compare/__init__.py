"""`python3 -m shared.compare`: do two training runs agree, and how do they differ? The answer is a page to look at."""
