"""Many images to one file of features: what to read, where rows go, and how a run that was interrupted goes on."""
