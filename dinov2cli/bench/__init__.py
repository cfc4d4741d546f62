"""Measurements behind `dinov2 bench`: ours beside a reference, in one process."""
