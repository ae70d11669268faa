"""The command line: Lightning's CLI with one line for every mistake, and what the commands share."""
