"""The command line and its jobs, on top of the library. Nothing outside this package imports it."""
