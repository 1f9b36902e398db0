"""Exact soft decision processes on which each claim of the method is one function that returns its margin."""

from tdistill.tabular.check import check_theory

__all__ = ["check_theory"]
