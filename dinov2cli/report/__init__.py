"""Figures and the one-file HTML report. Takes plain data and gives strings and bytes; reads no file of any format."""
