"""Checkpoint in, release out. The only room that knows both training and function."""
