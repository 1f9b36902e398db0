"""Slow references in NumPy float64, written from the formulas and importing nothing from the package under test."""
