"""The bars of docs/performance.md, by hand."""

from __future__ import annotations

import pytest

from tdistill.reports.performance import Bar, bars, bars_table

SECONDS = {
    "body_s": 2.0,
    "bd_s": 2.1,
    "bd_uncapped_s": 2.2,
    "bd_default_s": 2.6,
    "trl_chunked_s": 10.0,
    "head": {"candidates_s": 0.05, "default_s": 0.5, "dense_s": 1.0},
    "with_optimiser": {
        "100": {"bd_default_s": 3.0, "sft_s": 4.0},
        "500": {"bd_default_s": 3.0, "sft_s": 10.0},
    },
    "vocabulary": {
        "1000": {"body_s": 3.0, "bd_s": 3.3, "bd_default_s": 3.5},
        "200": {"body_s": 2.0, "bd_s": 2.1, "bd_default_s": 2.5},
    },
}
MEMORY = {
    "vocabulary": {
        "100": {"body_bytes": 1000, "bd_bytes": 1100, "bd_default_bytes": 1200, "sft_bytes": 1500},
        "900": {"body_bytes": 4000, "bd_bytes": 4110, "bd_default_bytes": 4204, "sft_bytes": 5000},
    }
}


def test_ratios_of_steps_and_heads():
    found = {bar.what: bar for bar in bars({"step": SECONDS})}
    wanted = {
        "step / body, bare": (1.05, True),
        "step / body, default": (1.3, False),
        "step / body, bare, no cap": (1.1, True),
        "head alone / dense head, bare": (0.05, True),
        "head alone / dense head, default": (0.5, False),
        "step with optimiser / SFT, default, 100 tokens": (0.75, False),
        "step with optimiser / SFT, default, 500 tokens": (0.3, True),
        "step / TRL chunked, live teacher, bare": (0.21, True),
        "step / TRL chunked, live teacher, default": (0.26, True),
        # (3.3 − 3.0) − (2.1 − 2.0) = 0.2 of a body of 2.0.
        "growth of step − body from 32k to 256k tokens / body, bare": (0.1, False),
        "growth of step − body from 32k to 256k tokens / body, default": (0.0, True),
    }
    assert {what: (pytest.approx(bar.value), bar.met) for what, bar in found.items()} == wanted


def test_a_peer_that_was_not_measured_has_no_bar():
    without = {name: value for name, value in SECONDS.items() if name != "trl_chunked_s"}
    assert not [bar for bar in bars({"step": without}) if "TRL" in bar.what]


def test_shares_of_memory():
    values = {bar.what: bar.value for bar in bars({"memory": MEMORY})}
    assert values["memory above the body / SFT's, bare, 100 tokens"] == pytest.approx(0.2)
    assert values["memory above the body / SFT's, default, 900 tokens"] == pytest.approx(0.204)
    # BD grows by 10 and 4, SFT by 500.
    assert values["growth of memory above the body from 100 to 900 tokens / SFT's, bare"] == pytest.approx(0.02)
    assert values["growth of memory above the body from 100 to 900 tokens / SFT's, default"] == pytest.approx(0.008)


def test_a_missed_bar_is_marked_in_the_table():
    table = bars_table({"step": SECONDS})
    assert "| step / body, bare | ≤ 1.08 | 1.05 | yes |" in table
    assert "| step / body, default | ≤ 1.2 | 1.3 | **no** |" in table


def test_bars_that_have_to_be_reached():
    assert Bar("speed", 2.0, 1.0, least=True).met and not Bar("speed", 0.5, 1.0, least=True).met
    assert "| step over tokens: R² | ≥ 0.99 | 0.5 | **no** |" in bars_table({"scaling": {"r_squared": 0.5}})
