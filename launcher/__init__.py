"""Starts and watches training jobs. Imports neither torch nor DeepSpeed, so it answers at once on a login node."""
