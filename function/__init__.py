"""A request in, an answer out. Knows the release, and nothing of how it was made."""
