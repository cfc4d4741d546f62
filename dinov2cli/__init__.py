"""dinov2cli: from a folder of raw images to a trained, evaluated vision backbone.

Importing this package imports nothing heavy; the command line is `dinov2cli.cli.main`.
"""

__version__ = "0.1.0"
