"""Semantic segmentation with a linear layer on frozen patch tokens."""
