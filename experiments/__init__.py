"""Experiments: one file each, run as ``python -m experiments.NAME``; every one explains itself under ``--help``."""
