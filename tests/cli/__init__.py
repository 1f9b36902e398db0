"""Tests of the command line, and the harness that other tests drive it with."""
