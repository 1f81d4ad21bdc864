"""Self-supervised methods: what each of them adds to an encoder."""
