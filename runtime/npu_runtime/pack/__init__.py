"""An artifact in the form that another program serves it from."""
