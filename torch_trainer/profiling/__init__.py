"""Where the time of a step goes, and how much of a device's peak it uses."""
