"""What opens programs.

`base` holds the protocols, `table` the backends by name; each other module is one backend.
"""
