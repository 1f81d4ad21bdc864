"""The commands that start and join a federation of separate processes."""
