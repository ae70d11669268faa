"""The command line: configurations, help, one line for every mistake, and what the commands share."""
