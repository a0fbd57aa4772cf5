"""What is measured of a network before it is frozen: ranges, what rounding does, and the limits that follow."""
