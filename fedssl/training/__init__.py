"""Local training, free of Flower."""
