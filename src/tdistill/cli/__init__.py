"""Command line: one verb per stage of a run."""
