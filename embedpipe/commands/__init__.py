"""Commands: one module a verb. Each is a Python function whose keyword arguments are the options of the command line."""
