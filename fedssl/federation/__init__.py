"""The server: rounds, clients' replies, aggregation."""
