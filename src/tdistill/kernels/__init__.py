"""Kernels: from hidden states, the output matrix and the stored action sets to the fields of ActionStats."""
