"""From conf/ and the command line to checked settings."""
