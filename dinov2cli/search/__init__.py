"""Nearest neighbours, edges, k-means, components and image hashes: everything that compares one image with another."""
