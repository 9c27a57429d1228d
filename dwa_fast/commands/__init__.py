"""The command line. Nothing is imported here: `cli` must be there at once, so that Ctrl-C ends every command in the same way."""
