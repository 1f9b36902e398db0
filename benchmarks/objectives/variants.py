"""The variants that are compared, and the questions they answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

INF = math.inf


@dataclass(frozen=True)
class Variant:
    """One second phase.

    Attributes:
        args: arguments on top of the shared ones.
        rollouts: settings of the student's own answers on top of the shared ones, or None for none of these answers.
        text: whether the language-modelling term on plain text (J_PT) is added.
        num_seeds: how many of the setup's seeds it is run with.
    """

    args: dict[str, Any] = field(default_factory=dict)
    rollouts: dict[str, Any] | None = None
    text: bool = False
    num_seeds: int = 10


def iq(**changes: Any) -> dict[str, Any]:
    """iq_learn spelled out, so that a change of the library's defaults does not change a row."""
    base = {"name": "iq_learn", "alpha": 10.0, "gamma": 0.99, "coordinates": "value_head", "first_order": "expected"}
    return {**base, "phi": "chi2", "steps": 1, "student_value_weight": 0.0, **changes}


def consistency(**changes: Any) -> dict[str, Any]:
    """path_consistency spelled out."""
    base = {"name": "path_consistency", "weight": 0.05, "gamma": 0.99, "steps": 1, "first_order": "expected"}
    return {**base, **changes}


def on(objective: dict[str, Any], **args: Any) -> Variant:
    """A variant with an objective."""
    return Variant({"objective": objective, **args})


def with_text(variant: Variant) -> Variant:
    """The same with the language-modelling term on plain text."""
    return replace(variant, text=True)


def with_rollouts(objective: dict[str, Any], rollouts: dict[str, Any] | None = None, **args: Any) -> Variant:
    """A variant with an objective on the teacher's and the student's answers."""
    return Variant({"objective": objective, **args}, rollouts=rollouts or {})


# As in the paper: all answers are the student's, drawn with the teacher's policy mixed in, of the latest round.
MINILLM = {"share": 1.0, "replay": 0.0, "teacher_mix": 0.2}


def baselines() -> dict[str, Variant]:
    """What people use instead; the dense ones with the teacher in memory too, which is how they are published."""
    live = {"source": "teacher"}
    return {
        "forward_kl, store": on({"name": "forward_kl"}),
        "forward_kl, teacher in memory": on({"name": "forward_kl", **live}),
        "reverse_kl, store": on({"name": "reverse_kl"}),
        "reverse_kl, teacher in memory": on({"name": "reverse_kl", **live}),
        "gkd, no own answers": on({"name": "gkd", **live}),
        "gkd, half own answers": with_rollouts({"name": "gkd", **live}),
        "gkd, half own answers, store": with_rollouts({"name": "gkd"}),
        "skew_kl forward": on({"name": "skew_kl", **live}),
        "skew_kl reverse": on({"name": "skew_kl", "direction": "reverse", **live}),
        "skew_kl reverse, half own answers": with_rollouts({"name": "skew_kl", "direction": "reverse", **live}),
        "distillm2": with_rollouts({"name": "distillm2", **live}),
        "alpha_beta": on({"name": "alpha_beta", **live}),
        "total_variation": on({"name": "total_variation", **live}),
        "sampled_kl": on({"name": "sampled_kl", **live}),
        "minillm": with_rollouts({"name": "minillm", **live}, MINILLM),
        "minillm, plain text": with_text(with_rollouts({"name": "minillm", **live}, MINILLM)),
        "minillm, store": with_rollouts({"name": "minillm"}, MINILLM),
        **{
            f"{name}, set": on({"name": name, "source": "set"})
            for name in ("reverse_kl", "gkd", "skew_kl", "alpha_beta", "total_variation")
        },
        "gkd, set, half own answers": with_rollouts({"name": "gkd", "source": "set"}),
        "skew_kl reverse, set": on({"name": "skew_kl", "direction": "reverse", "source": "set"}),
        "minillm, single step only": with_rollouts({"name": "reverse_kl", **live}, {"share": 1.0, "replay": 0.0}),
    }


OTHER_PHI = ("reverse_kl", "hellinger", "jensen_shannon", "total_variation")
# A row as it is, and without the value of the next state.
TWINS: dict[str, dict[str, Any]] = {"": {}, ", gamma 0": {"gamma": 0.0}}
PRINTED = iq(alpha=0.1, coordinates="raw", first_order="sampled")
# With the floor under Q and the language-modelling term, which the paper's phase has beside the printed objective.
PRINTED_WHOLE = with_text(on({**PRINTED, "q_floor": -10.0}, off_support="none"))
CLONING = iq(alpha=INF)
# The library's default. The other rows ask for the teacher's own mass on the set.
TO_SET = {"off_support_target": "set"}
BOTH = {"states": "both"}

# At the tiny scale the others have the learning rate of the second phase, 1e-3.
RATES_SEARCHED = (
    "alpha inf",
    "sft continued",
    "forward_kl, store",
    "reverse_kl, teacher in memory",
    "gkd, half own answers",
    "skew_kl reverse",
    "minillm",
)

TINY: dict[str, Variant] = {
    "sft continued": on({"name": "sft"}),
    "as printed (alpha 0.1, raw, sampled, no control)": on(PRINTED, off_support="none"),
    "as printed with control": on(PRINTED),
    **{
        f"as printed with floor and plain text{', learning rate 0.0001' if rate else ''}": replace(
            PRINTED_WHOLE, args={**PRINTED_WHOLE.args, **rate}
        )
        for rate in ({}, {"learning_rate": 1e-4})
    },
    **{f"alpha {alpha:g}": on(iq(alpha=alpha)) for alpha in (INF, 100.0, 10.0, 1.0, 0.1)},
    "alpha 100, gamma 0": on(iq(alpha=100.0, gamma=0.0)),
    **{f"alpha 1, gamma {gamma:g}": on(iq(alpha=1.0, gamma=gamma)) for gamma in (0.0, 0.5, 0.9, 1.0)},
    "alpha 10, gamma 0": on(iq(gamma=0.0)),
    **{
        f"alpha {alpha:g}, {coordinates}{shown}": on(iq(alpha=alpha, coordinates=coordinates, **twin))
        for shown, twin in TWINS.items()
        for alpha in (1.0, 10.0)
        for coordinates in ("raw", "max_set")
    },
    **{
        f"{phi}, scale {alpha:g}{shown}": on(iq(alpha=alpha, phi=phi, **twin))
        for shown, twin in TWINS.items()
        for alpha in (1.0, 10.0)
        for phi in OTHER_PHI
    },
    **{f"alpha 1, {steps} steps": on(iq(alpha=1.0, steps=steps)) for steps in (2, 4, 16)},
    "alpha 10, sampled": on(iq(first_order="sampled")),
    "alpha inf, sampled": on(iq(alpha=INF, first_order="sampled")),
    **{f"alpha inf, p {p:g}": on(CLONING, p=p) for p in (0.5, 0.8, 0.99)},
    "alpha inf, p by a budget of 1 nat": on(CLONING, p=None, p_budget_nats=1.0),
    "alpha inf, p by a budget of 4 nats": on(CLONING, p=None, p_budget_nats=4.0),
    "alpha inf, no control": on(CLONING, off_support="none"),
    "alpha inf, union": on(CLONING, off_support="union"),
    "alpha inf, negatives": on(CLONING, off_support="negatives"),
    "alpha inf, plain text": with_text(on(CLONING, off_support="none")),
    "alpha inf, target set": on(CLONING, **TO_SET),
    "alpha inf, no control, p 0.5": on(CLONING, off_support="none", p=0.5),
    "alpha inf, target set, p 0.5": on(CLONING, **TO_SET, p=0.5),
    "alpha inf, sampled, target set, p 0.5, off-support weight 3": on(
        iq(alpha=INF, first_order="sampled"), **TO_SET, p=0.5, off_support_weight=3.0
    ),
    "consistency 0.05": on(consistency()),
    "consistency 0.05, gamma 0": on(consistency(gamma=0.0)),
    "consistency 0.05, 4 steps": on(consistency(steps=4)),
    "consistency 0.5": on(consistency(weight=0.5)),
    "consistency 0.5, gamma 0": on(consistency(weight=0.5, gamma=0.0)),
    "first-order term, half own states": with_rollouts(consistency(weight=0.0, **BOTH)),
    "consistency 0.2, half own states": with_rollouts(consistency(weight=0.2, **BOTH)),
    "consistency 0.2, half own states, gamma 0": with_rollouts(consistency(weight=0.2, gamma=0.0, **BOTH)),
    "alpha 1, value term on half own states": with_rollouts(iq(alpha=1.0, student_value_weight=0.5)),
    "sqil": with_rollouts({"name": "sqil"}),
    "ls_iq": with_rollouts({"name": "ls_iq"}),
    "ls_iq, absorbing value 0": with_rollouts({"name": "ls_iq", "absorbing": "zero"}),
    "teacher_q": on({"name": "teacher_q"}),
    "teacher_q, lambda 0.8": on({"name": "teacher_q", "lam": 0.8}),
    "teacher_q, residual": on({"name": "teacher_q", "target": "residual"}),
    "teacher_q, residual, gamma 0": on({"name": "teacher_q", "target": "residual", "gamma": 0.0}),
    "bellman_distill_authors": on({"name": "bellman_distill_authors"}, off_support="none"),
    **baselines(),
    **{
        f"{name}, learning rate {rate:g}": replace(variant, args={**variant.args, "learning_rate": rate}, num_seeds=3)
        for name, variant in {"alpha inf": on(CLONING), "sft continued": on({"name": "sft"}), **baselines()}.items()
        if name in RATES_SEARCHED
        for rate in (3e-4, 3e-3)
    },
}

# Title → rows; differences in a table are against its first row.
TINY_QUESTIONS: dict[str, list[str]] = {
    "α (χ², γ 0.99, value head, expected first-order term)": [
        "alpha inf",
        "alpha 100",
        "alpha 10",
        "alpha 1",
        "alpha 0.1",
        "sft continued",
    ],
    "The member with the best active temporal part and its twins (φ the identity; γ = 0)": [
        "alpha inf",
        "alpha 100",
        "alpha 100, gamma 0",
    ],
    "γ at α = 1": ["alpha inf", *(f"alpha 1, gamma {gamma}" for gamma in (0, 0.5, 0.9)), "alpha 1", "alpha 1, gamma 1"],
    "Coordinates, and the twins with γ = 0": [
        "alpha inf",
        *(
            f"alpha {alpha}{coordinates}{twin}"
            for alpha in (1, 10)
            for coordinates in ("", ", raw", ", max_set")
            for twin in TWINS
        ),
    ],
    "As printed": [
        "alpha inf",
        "as printed with control",
        "as printed (alpha 0.1, raw, sampled, no control)",
        "as printed with floor and plain text",
        "as printed with floor and plain text, learning rate 0.0001",
    ],
    "φ (χ²: alpha), and the twins with γ = 0": [
        "alpha inf",
        *(
            f"{name}{scale}{twin}"
            for scale in (1, 10)
            for name in ("alpha ", *(f"{phi}, scale " for phi in OTHER_PHI))
            for twin in TWINS
        ),
    ],
    "Steps d of one residual at α = 1": [
        "alpha inf",
        "alpha 1, gamma 0",
        "alpha 1",
        "alpha 1, 2 steps",
        "alpha 1, 4 steps",
        "alpha 1, 16 steps",
    ],
    "First-order term": ["alpha inf", "alpha inf, sampled", "alpha 10", "alpha 10, sampled"],
    "p (store at p_max = 0.99; transitions outside A_p are dropped)": [
        "alpha inf",
        "alpha inf, p 0.5",
        "alpha inf, p 0.8",
        "alpha inf, p 0.99",
        "alpha inf, p by a budget of 1 nat",
        "alpha inf, p by a budget of 4 nats",
    ],
    "Off-support control": [
        "alpha inf",
        "alpha inf, negatives",
        "alpha inf, union",
        "alpha inf, plain text",
        "alpha inf, no control",
        "alpha inf, target set",
    ],
    "Off-support control at p = 0.5": [
        "alpha inf, p 0.5",
        "alpha inf, target set, p 0.5",
        "alpha inf, no control, p 0.5",
        "alpha inf, sampled, target set, p 0.5, off-support weight 3",
    ],
    "Teacher-reward path consistency": [
        "alpha inf",
        "consistency 0.05",
        "consistency 0.05, gamma 0",
        "consistency 0.05, 4 steps",
        "consistency 0.5",
        "consistency 0.5, gamma 0",
        "first-order term, half own states",
        "consistency 0.2, half own states",
        "consistency 0.2, half own states, gamma 0",
    ],
    "Other members": [
        "alpha inf",
        "alpha 1, value term on half own states",
        "sqil",
        "ls_iq",
        "ls_iq, absorbing value 0",
        "teacher_q",
        "teacher_q, lambda 0.8",
        "teacher_q, residual",
        "teacher_q, residual, gamma 0",
        "bellman_distill_authors",
    ],
    "Baselines": ["alpha inf", "sft continued", *baselines()],
    "Baselines at other learning rates": [
        "alpha inf",
        *(
            f"{name}{rate}"
            for name in RATES_SEARCHED
            for rate in (", learning rate 0.0003", "", ", learning rate 0.003")
            if name + rate != "alpha inf"
        ),
    ],
}

# One seed each for screening; those with three are the finalists, their twins and the controls.
FINAL = 3


def screened(variant: Variant, num_seeds: int = 1) -> Variant:
    """The same variant with so many seeds."""
    return replace(variant, num_seeds=num_seeds)


REAL: dict[str, Variant] = {
    "alpha inf": screened(on(CLONING), FINAL),
    "sft continued, learning rate 3e-5": screened(on({"name": "sft"}, learning_rate=3e-5), FINAL),
    "alpha 10": screened(on(iq())),
    "alpha 100": screened(on(iq(alpha=100.0)), FINAL),
    "alpha inf, tail": screened(on(CLONING, off_support="tail")),
    "alpha 100, gamma 0": screened(on(iq(alpha=100.0, gamma=0.0)), FINAL),
    "alpha inf, no control": screened(on(CLONING, off_support="none")),
    "alpha inf, union": screened(on(CLONING, off_support="union")),
    "consistency 0.2, half own states": screened(with_rollouts(consistency(weight=0.2, **BOTH))),
    "first-order term, half own states": screened(with_rollouts(consistency(weight=0.0, **BOTH))),
    "as printed (alpha 0.1, raw, sampled, no control)": screened(on(PRINTED, off_support="none")),
    "consistency 0.05": screened(on(consistency())),
    "consistency 0.2, half own states, gamma 0": screened(with_rollouts(consistency(weight=0.2, gamma=0.0, **BOTH))),
    "sft continued, learning rate 1e-4": screened(on({"name": "sft"}, learning_rate=1e-4)),
    "sft continued, learning rate 3e-4": screened(on({"name": "sft"})),
    "sqil": screened(with_rollouts({"name": "sqil"})),
    "ls_iq": screened(with_rollouts({"name": "ls_iq"})),
    "teacher_q": screened(on({"name": "teacher_q"})),
    "bellman_distill_authors": screened(on({"name": "bellman_distill_authors"}, off_support="none")),
}
REAL_QUESTIONS: dict[str, list[str]] = {
    "α, and the twins of α = 100": ["alpha inf", "alpha 100", "alpha 100, gamma 0", "alpha 10"],
    "Supervised fine-tuning, continued": [
        "alpha inf",
        "sft continued, learning rate 3e-5",
        "sft continued, learning rate 1e-4",
        "sft continued, learning rate 3e-4",
    ],
    "Off-support control": ["alpha inf", "alpha inf, tail", "alpha inf, union", "alpha inf, no control"],
    "As printed": ["alpha inf", "as printed (alpha 0.1, raw, sampled, no control)"],
    "Teacher-reward path consistency": [
        "alpha inf",
        "consistency 0.05",
        "first-order term, half own states",
        "consistency 0.2, half own states",
        "consistency 0.2, half own states, gamma 0",
    ],
    "Other members": ["alpha inf", "sqil", "ls_iq", "teacher_q", "bellman_distill_authors"],
}

VARIANTS = {"tiny": TINY, "real": REAL}
QUESTIONS = {"tiny": TINY_QUESTIONS, "real": REAL_QUESTIONS}
