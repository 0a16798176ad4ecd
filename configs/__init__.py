"""One file a job; each docstring has the command and the result to expect."""
