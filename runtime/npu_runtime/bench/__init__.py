"""How long a call takes, measured so that backends can be compared."""
