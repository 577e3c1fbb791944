"""Scripts that record the figures of one machine each."""
