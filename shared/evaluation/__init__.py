"""What a trained ControlNet is worth, in figures and in pictures; numpy alone, for both backends."""
