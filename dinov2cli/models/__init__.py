"""Backbones, heads and their weights in three naming conventions. Nothing here knows about training."""
