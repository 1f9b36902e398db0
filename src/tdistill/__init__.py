"""tdistill: temporal-difference distillation on the teacher's reduced action space."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdistill.store import Store
    from tdistill.store.capture import capture
    from tdistill.training import TDistillConfig, TDistillTrainer

_EXPORTS = {
    "Store": "tdistill.store",
    "TDistillConfig": "tdistill.training",
    "TDistillTrainer": "tdistill.training",
    "capture": "tdistill.store.capture",
}
__all__ = ["Store", "TDistillConfig", "TDistillTrainer", "capture"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line should not load torch to print a help text.
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tdistill' has no attribute {name!r}")
