"""Differences between groups of images: attributes, groups, what is measured of them and the protocols."""
