"""Images: where they come from, how they are decoded, cached, dealt out and varied."""
