"""How a command runs: flags and config in, exit code and one line of error out."""
