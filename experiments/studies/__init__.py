"""Claims of papers in miniature, one file each, run by `python -m experiments.studies NAME`."""
