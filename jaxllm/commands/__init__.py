"""The command line: `cli`, and a file for each command."""
