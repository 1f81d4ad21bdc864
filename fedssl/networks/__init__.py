"""The layers of an encoder and its heads."""
