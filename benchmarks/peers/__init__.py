"""The arms of the throughput benchmark. Each module trains one way, in a process of its own, on the same token rows."""
