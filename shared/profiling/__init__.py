"""What both backends' profiles have in common: which steps, how a fault is told, and how much of a device is used."""
