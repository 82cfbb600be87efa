"""The command line and its jobs, on top of the library: nothing outside this package imports it."""
