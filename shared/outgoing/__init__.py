"""What leaves the program: messages that reveal and forge nothing, files that are whole or not there."""
