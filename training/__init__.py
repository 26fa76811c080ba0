"""Examples in, checkpoint out. Knows torch, and neither a bucket nor a server."""
