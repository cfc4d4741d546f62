"""The command line: one short file per command, which parses, builds plain arguments, calls the core and prints."""
