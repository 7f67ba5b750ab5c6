"""Command line: parse arguments, call the core, print the result."""
