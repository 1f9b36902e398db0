"""The trajectory store: what a teacher said, kept once and read many times (format: docs/store-format.md)."""

from tdistill.store.read import Store
from tdistill.store.verify import verify_store

__all__ = ["Store", "verify_store"]
