"""Checkpoints from and to DeepSpeed's own format."""
