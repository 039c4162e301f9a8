"""Pictures by one command, whichever backend draws them: flags → what to draw → pictures in a folder."""
