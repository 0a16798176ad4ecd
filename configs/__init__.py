"""One file for each job; its docstring has the command and expected result."""
