"""Experiment binaries, each run as `python -m experiments.NAME`."""
