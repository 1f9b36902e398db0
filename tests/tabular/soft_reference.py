"""Soft decision processes by plain loops, written from the formulas; nothing is imported from src/."""

import math


def top_p(probs, p):
    """Smallest set of actions by falling probability, ties by lower action first, whose mass reaches p."""
    chosen, mass = [], []
    for action in sorted(range(len(probs)), key=lambda a: (-probs[a], a)):
        chosen.append(action)
        mass.append(probs[action])
        if math.fsum(mass) >= p:
            break
    return sorted(chosen)


def log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def expected(process, state, action, value):
    """E[V(s')] with V = 0 at the end, which is state S."""
    pairs = zip(process.next_SAB[state, action], process.prob_SAB[state, action], strict=True)
    return math.fsum(weight * (value[after] if after < len(value) else 0.0) for after, weight in pairs)


def sweep(process, backup, steps):
    """Value iteration V ← backup(Q), Q = r + γ E V, from 0; returns Q."""
    num_states, num_actions = process.reward_SA.shape
    value = [0.0] * num_states
    for _ in range(steps + 1):
        q = [
            [process.reward_SA[s, a] + process.gamma * expected(process, s, a, value) for a in range(num_actions)]
            for s in range(num_states)
        ]
        value = [backup(s, q[s]) for s in range(num_states)]
    return q


def optimal(process, sets, steps=600):
    """Q of the best policy on the sets."""
    return sweep(process, lambda s, q: log_sum_exp([q[a] for a in sets[s]]), steps)


def of_policy(process, policy, steps=600):
    """Q of a policy: V = E[Q − log π]."""

    def value(s, q):
        return math.fsum(pi * (q[a] - math.log(pi)) for a, pi in enumerate(policy[s]) if pi > 0)

    return sweep(process, value, steps)


def discounted_surprise(process, policy, mass, steps=600):
    """Σ_{k=1}^{steps} −γ^k E[log Z(s_k)] from each (s, a), by following the distribution of s_k."""
    num_states, num_actions = process.reward_SA.shape
    # ahead[s]: the sum from state s on, its own term included and undiscounted.
    ahead = [0.0] * num_states
    for _ in range(steps):
        after = [
            [process.gamma * expected(process, s, a, ahead) for a in range(num_actions)] for s in range(num_states)
        ]
        ahead = [
            -math.log(mass[s]) + math.fsum(policy[s][a] * after[s][a] for a in range(num_actions))
            for s in range(num_states)
        ]
    return [[process.gamma * expected(process, s, a, ahead) for a in range(num_actions)] for s in range(num_states)]
