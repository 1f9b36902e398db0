"""How sparse the teacher is, from a store alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from tdistill.actions import nested_sizes
from tdistill.store import Store

_RANKS = (1, 2, 3, 5, 7, 10, 20, 50)
_MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)


def sparsity(store: Store, max_trajectories: int = 2000) -> dict[str, Any] | None:
    """Mean mass of the top k tokens, and sizes of A_p, over the stored states.

    Only what the store holds whole is reported: k up to the cap, and p up to p_max. A size at the cap stands for
    "at least"; the share of such states is given.

    Args:
        store: any store with sets.
        max_trajectories: how many trajectories are read, from the first.
    Returns:
        ``num_states``, ``top_k_mass``, ``set_size`` and ``note``; None for a store at p_max = 1, which has no sets.
    """
    if store.p_max == 1.0:
        return None
    cap = store.identity["sampling"]["max_actions"]
    sets = [store[i].sets for i in range(min(len(store), max_trajectories))]
    mass = np.concatenate([_top_masses(s.log_probs, s.offsets) for s in sets])
    stored = np.concatenate([np.diff(s.offsets) for s in sets])
    rows = []
    for p in sorted({*(p for p in _MASSES if p < store.p_max), store.p_max}):
        sizes = stored if p == store.p_max else np.concatenate([nested_sizes(s, p) for s in sets])
        rows.append(
            {
                "p": p,
                "mean": float(sizes.mean()),
                "median": float(np.median(sizes)),
                "p99": float(np.percentile(sizes, 99)),
                "max": int(sizes.max()),
                "share_at_cap": float((sizes == cap).mean()) if cap else 0.0,
            }
        )
    return {
        "num_states": len(mass),
        "top_k_mass": [
            {"k": k, "mean": float(mass[:, i].mean())} for i, k in enumerate(_RANKS) if cap is None or k <= cap
        ],
        "set_size": rows,
        "note": f"From the store (p_max = {store.p_max}, cap {cap}): where a set is smaller than k, its whole mass "
        "counts for k, so the mass of large k is a lower bound.",
    }


def _top_masses(log_probs_M: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Mass of the first k slots of each state, float64 [R, ranks]."""
    total = np.concatenate([[0.0], np.cumsum(np.exp(log_probs_M.astype(np.float64)))])
    last = np.minimum(offsets[:-1, None] + np.array(_RANKS), offsets[1:, None])
    return total[last] - total[offsets[:-1, None]]
