"""Frozen patch tokens of whole images, and the training of heads on them: what segmentation and depth share."""
