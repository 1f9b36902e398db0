"""Teachers: where action sets come from."""
