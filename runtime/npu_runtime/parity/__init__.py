"""How far outputs are from the reference, and whether that is near enough."""
