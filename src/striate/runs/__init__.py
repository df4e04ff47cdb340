"""Run folders and the command line: each verb reads paths and writes a run folder."""
