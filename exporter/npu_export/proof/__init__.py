"""What is measured of a network before it is frozen, and what of it is refused."""
