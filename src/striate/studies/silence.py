"""Importing this silences libraries, in a process that is given nothing but a list of modules to import."""

from striate.runs.cli import quiet

quiet()
