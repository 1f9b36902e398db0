"""Check the theory, measure how tight it is, run the horizon experiment, and write the tables of docs/theory.md.

python benchmarks/theory.py            some two minutes on one core; writes benchmarks/results/theory.json
python benchmarks/theory.py --docs     docs/theory.md from the committed JSON alone
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from tdistill.files import write_atomically
from tdistill.tabular import check_theory
from tdistill.tabular.horizon import GROWTH_RANGES, Method, horizon_experiment
from tdistill.tabular.measure import measure_policy_error, measure_tightness

RESULTS = Path("benchmarks/results/theory.json")
PAGE = Path("docs/theory.md")
NUM_PROCESSES, NUM_SEEDS, SEED = 300, 20, 0
# A student that can represent the teacher, on fewer processes: a control.
CONTROL = {
    "num_seeds": 4,
    "settings": [("forgiving", "exact")],
    "methods": [Method(alpha, 0.99, "per_step") for alpha in (math.inf, 100.0, 10.0, 1.0, 0.1)],
}
# Rows of the experiment's table; the JSON has more.
SHOWN = [
    "bc",
    *(f"bd alpha={alpha} gamma=0.99 per_step" for alpha in ("100", "10", "1", "0.1")),
    "bd alpha=0.1 gamma=0.99 stationary",
    "bd alpha=1 gamma=0 per_step",
    "bd alpha=0.1 gamma=0 per_step",
]
SHOWN_HORIZONS = (8, 64, 512)
EPISODES_AT = 64


def measure() -> dict[str, Any]:
    """Everything that the page shows."""
    return {
        "num_processes": NUM_PROCESSES,
        "seed": SEED,
        "claims": check_theory(NUM_PROCESSES, SEED),
        "tightness": measure_tightness(NUM_PROCESSES, SEED),
        "policy_error": measure_policy_error(NUM_PROCESSES, SEED),
        "num_seeds": NUM_SEEDS,
        "horizon": horizon_experiment(NUM_SEEDS, SEED),
        "horizon_control": horizon_experiment(seed=SEED, **CONTROL),
    }


def rounded(value: Any) -> Any:
    """Floats to six significant digits: what lies below is rounding of one machine or another."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def as_json(content: dict[str, Any]) -> str:
    """JSON with one line per row of a list."""
    parts = []
    for key, value in content.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in value] if isinstance(value, list) else []
        parts.append(f" {json.dumps(key)}: " + ("[\n  " + ",\n  ".join(lines) + "\n ]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def claims_table(content: dict[str, Any]) -> str:
    """One row per claim."""
    rows = [
        [
            f"`{row['claim']}`",
            str(row["cases"]),
            str(row["violations"]),
            f"{row['worst_margin']:.1e}",
            f"{row['tolerance']:.1e}",
        ]
        for row in content["claims"]
    ]
    return table(["claim", "cases", "violations", "worst margin", "largest tolerance"], rows)


def tightness_table(content: dict[str, Any]) -> str:
    """One row per kind of reward and of episode."""

    def quartiles(values: list[float]) -> str:
        return f"{values[1]:.3f} ({values[0]:.3f}–{values[2]:.3f})"

    rows = [
        [
            f"{row['reward'].replace('_', ' ')}, {row['episodes']}",
            str(row["cases"]),
            f"{row['perplexity']:.1f}",
            quartiles(row["loss_share"]),
            quartiles(row["optimum_share"]),
        ]
        for row in sorted(content["tightness"], key=lambda row: (row["episodes"] != "endless", -row["perplexity"]))
    ]
    return table(["rewards, episodes", "cases", "teacher perplexity", "loss / κ", "‖Q* − Q̄*_p‖ / κ"], rows)


def policy_error_table(content: dict[str, Any]) -> str:
    """One row per α."""
    rows = [
        [f"{row['alpha']:g}", f"{row['total_variation']:.2g}", f"{row['divergence']:.2g}"]
        for row in content["policy_error"]
    ]
    return table(["α", "largest total variation of a state", "KL per episode (nats)"], rows)


def shown_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the experiment, the shown methods in the order of ``SHOWN`` within each setting."""
    rows = [row for row in content["horizon"] if row["method"] in SHOWN]
    settings = list(dict.fromkeys((row["process"], row["student"]) for row in rows))
    return sorted(rows, key=lambda row: (settings.index((row["process"], row["student"])), SHOWN.index(row["method"])))


def method_name(row: dict[str, Any]) -> str:
    """Name of a method in the tables."""
    if row["alpha"] is None:
        return "BC"
    name = f"BD, α {row['alpha']:g}, γ {row['gamma']:g}"
    return f"{name}, one v for all steps" if row["head"] == "stationary" else name


def episodes_table(content: dict[str, Any]) -> str:
    """What the student's own episodes are like where there is a track to leave."""
    rows = []
    for row in shown_rows(content):
        if row["process"] == "unforgiving":
            at = row["horizons"].index(EPISODES_AT)
            means = row["means"]
            rows.append(
                [
                    f"{row['student'].replace('_', ' ')}: {method_name(row)}",
                    f"{means['off_track'][at]:.2f}",
                    f"{means['entropy'][at]:.2f}",
                    f"{means['student_teacher'][at]:.1f}",
                    f"{means['teacher_student'][at]:.1f}",
                ]
            )
    header = [
        f"student: method, H {EPISODES_AT}",
        "steps off the track",
        "entropy per step (nats)",
        "KL(student ‖ teacher)",
        "KL(teacher ‖ student)",
    ]
    return table(header, rows)


def horizon_table(content: dict[str, Any]) -> str:
    """One row per setting and shown method."""
    ranges = [f"{low}–{high}" for low, high in GROWTH_RANGES]

    def with_interval(value: list[float]) -> str:
        mean, low, high = (round(number, 2) + 0.0 for number in value)  # no −0.00
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]"

    rows = []
    for row in shown_rows(content):
        found, cloning = row["student_teacher"], row["alpha"] is None
        ratios = dict(zip(row["horizons"], found["log_ratio_to_cloning"], strict=True))
        rows.append(
            [
                f"{row['process']}, {row['student'].replace('_', ' ')}: {method_name(row)}",
                *map(with_interval, found["exponents"]),
                *("" if cloning else with_interval(value) for value in found["exponents_cloning_minus_this"]),
                " / ".join("1" if cloning else f"{math.exp(ratios[horizon][0]):.2f}" for horizon in SHOWN_HORIZONS),
            ]
        )
    header = [
        "process, student: method",
        *(f"exponent, H {part}" for part in ranges),
        *(f"BC's minus this, H {part}" for part in ranges),
        f"error / BC's at H {' / '.join(map(str, SHOWN_HORIZONS))}",
    ]
    return table(header, rows)


def control_table(content: dict[str, Any]) -> str:
    """Errors of the student that can represent the teacher."""
    rows = [
        [
            method_name(row),
            *(f"{row['means']['student_teacher'][row['horizons'].index(horizon)]:.2g}" for horizon in SHOWN_HORIZONS),
        ]
        for row in content["horizon_control"]
    ]
    return table(["method", *(f"H {horizon}" for horizon in SHOWN_HORIZONS)], rows)


TABLES = {
    "claims": claims_table,
    "tightness": tightness_table,
    "policy error": policy_error_table,
    "horizon": horizon_table,
    "episodes": episodes_table,
    "control": control_table,
}


def page(text: str) -> str:
    """docs/theory.md with its tables made new from the committed JSON."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, make in TABLES.items():
        block = f"<!-- {name} -->\n{make(content)}<!-- /{name} -->"
        text, found = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f"{PAGE} must have the marker <!-- {name} --> once; it has it {found} times.")
    return text


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--docs"]):
        raise SystemExit(__doc__)
    if not sys.argv[1:]:
        write_atomically(RESULTS, as_json(rounded(measure())))
    write_atomically(PAGE, page(PAGE.read_text(encoding="utf-8")))
