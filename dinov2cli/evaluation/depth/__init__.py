"""Monocular depth with linear and DPT heads on frozen patch tokens."""
