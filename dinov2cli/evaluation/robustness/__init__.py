"""Shifted sets and corruptions."""
