"""Numbers that stand for log-probabilities, masses and token ids in a shard (docs/store-format.md, §6)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tdistill.errors import ConfigError, StoreCorruptError, StoreError

# Uniform steps of a log-probability, per nat. A power of two, so that the only error is the rounding of the code.
_STEPS_PER_NAT_16 = 2048
# Eight bits: steps of √p, per unit, down to the p where such a step is as long as one of _TAIL_STEP_NATS.
_ROOT_STEPS = 40
_TAIL_STEP_NATS = 1.0
_TAIL_CODE = _ROOT_STEPS - 2 / _TAIL_STEP_NATS
_TAIL_NATS = -2 * np.log(2 / (_ROOT_STEPS * _TAIL_STEP_NATS))
_MASS_STEPS = 64
_LOG_SUM_EXP_STEPS = 16
# A token that occurs less often in a shard does not repay its place in the list of common ones.
_LEAST_COUNT = 20

_CODE_BITS, _NUMBER_BITS = 16, 24


def check_log_prob_bits(bits: int) -> None:
    """Raise ConfigError unless log-probabilities can be kept in so many bits."""
    if bits not in (8, 16):
        raise ConfigError(
            f"log_prob_bits = {bits} is not supported. Use 16 (error {quantisation_error(16):.2g} nats) or 8 "
            f"(error 1/{2 * _ROOT_STEPS} in √p)."
        )


def quantisation_error(bits: int) -> float:
    """Largest error of a stored log-probability above :func:`quantisation_floor`, nats: half of the longest step."""
    return 0.5 / _STEPS_PER_NAT_16 if bits == 16 else _TAIL_STEP_NATS / 2


def quantisation_floor(bits: int) -> float:
    """Smallest log-probability that can be stored, nats. Anything below it is stored as this value."""
    return float(_from_code(np.array([2.0**bits - 1]), bits)[0])


def quantise(log_probs: np.ndarray, bits: int) -> np.ndarray:
    """Code of each log-probability: round(c(log p)), at most 2^bits − 1.

    16 bits: c = −s·log p, s = 2048. 8 bits: c = S·(1 − √p) while a step of √p is shorter than Δ nats, that is down to
    √p = 2/(S·Δ), then one code per Δ nats (S = 40, Δ = 1).

    Derived: rounding log p with the step h(p) adds Σ_a p·h(p)²/24 to KL(teacher‖stored). For a given mean of log h per
    action this is smallest for h ∝ p^(−1/2), which is a uniform step of √p.

    Args:
        log_probs: float [M], nats, at most 0; ``-inf`` is allowed.
        bits: 8 or 16.
    Returns:
        uint8 or uint16 [M].
    """
    check_log_prob_bits(bits)
    codes = np.clip(np.rint(_to_code(log_probs.astype(np.float64), bits)), 0, 2**bits - 1)
    return codes.astype(np.uint8 if bits == 8 else np.uint16)


def dequantise(codes: np.ndarray, bits: int) -> np.ndarray:
    """Log-probabilities of the codes, float32 [M], nats."""
    check_log_prob_bits(bits)
    return _log_probs(bits)[codes]


def log_prob_bounds(log_probs: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest log-probabilities that share a code with the given ones, float64 [M] each, nats.

    At :func:`quantisation_floor` the smallest is −∞.
    """
    codes = _to_code(log_probs.astype(np.float64), bits)
    low = _from_code(codes + 0.5, bits)
    return np.where(codes > 2**bits - 1.5, -np.inf, low), _from_code(np.maximum(codes - 0.5, 0.0), bits)


@lru_cache
def _log_probs(bits: int) -> np.ndarray:
    values = _from_code(np.arange(2.0**bits), bits).astype(np.float32) + np.float32(0)  # + 0 turns -0 into 0
    values.flags.writeable = False
    return values


@lru_cache
def _probs(bits: int) -> np.ndarray:
    return np.exp(_log_probs(bits).astype(np.float64))


def _to_code(log_probs: np.ndarray, bits: int) -> np.ndarray:
    if bits == 16:
        return -log_probs * _STEPS_PER_NAT_16
    root = _ROOT_STEPS * (1 - np.exp(log_probs / 2))
    return np.where(log_probs > -_TAIL_NATS, root, _TAIL_CODE + (-log_probs - _TAIL_NATS) / _TAIL_STEP_NATS)


def _from_code(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 16:
        return codes / -_STEPS_PER_NAT_16
    root = 2 * np.log1p(-np.minimum(codes, _TAIL_CODE) / _ROOT_STEPS)
    return np.where(codes < _TAIL_CODE, root, -_TAIL_NATS - (codes - _TAIL_CODE) * _TAIL_STEP_NATS)


def mass_error(bits: int) -> float:
    """Largest error of a stored ``covered_mass``: none beside 16-bit log-probabilities, 1/128 beside those of 8."""
    return 0.0 if bits == 16 else 0.5 / _MASS_STEPS


def pack_log_sum_exp(log_sum_exp_R: np.ndarray, bits: int) -> np.ndarray:
    """What stands for ``log_sum_exp``: float32 as it is, or int32 steps of 1/16 nat beside 8-bit log-probabilities."""
    if bits == 16:
        return log_sum_exp_R.astype(np.float32)
    return np.rint(log_sum_exp_R.astype(np.float64) * _LOG_SUM_EXP_STEPS).astype(np.int32)


def unpack_log_sum_exp(values_R: np.ndarray, bits: int) -> np.ndarray:
    """``log_sum_exp``, float32 [R], nats."""
    return values_R if bits == 16 else values_R.astype(np.float32) / np.float32(_LOG_SUM_EXP_STEPS)


def listed_mass(codes_M: np.ndarray, offsets: np.ndarray, bits: int) -> np.ndarray:
    """Mass of all elements of each set by their codes, float64 [R]."""
    mass = np.concatenate([[0.0], np.cumsum(_probs(bits)[codes_M])])
    return mass[offsets[1:]] - mass[offsets[:-1]]


def pack_mass(covered_mass_R: np.ndarray, listed_R: np.ndarray, bits: int) -> np.ndarray:
    """What stands for ``covered_mass``: float32 as it is, or int16 steps of 1/64 above the listed mass."""
    if bits == 16:
        return covered_mass_R.astype(np.float32)
    return np.rint((covered_mass_R.astype(np.float64) - listed_R) * _MASS_STEPS).astype(np.int16)


def unpack_mass(values_R: np.ndarray, listed_R: np.ndarray, bits: int) -> np.ndarray:
    """``covered_mass``, float32 [R]."""
    if bits == 16:
        return values_R
    return np.clip(listed_R + values_R / _MASS_STEPS, 0.0, 1.0).astype(np.float32)


class Numbering:
    """A bijection between token ids and numbers: the common ids of a shard first, then all others in order.

    Sets are stored by rising number, as gaps. Numbers of frequent tokens are small, and so are their gaps.

    Args:
        common_ids: int [K], distinct, number 0 first.
        size: ids from 0 to ``size`` − 1 are numbered.
    Raises:
        StoreError: more ids than fit.
    """

    def __init__(self, common_ids: np.ndarray, size: int) -> None:
        if size > 1 << _NUMBER_BITS:
            raise StoreError(
                f"A vocabulary of {size:,} tokens is above the {1 << _NUMBER_BITS:,} that a store can number."
            )
        self.common_ids = np.asarray(common_ids, dtype=np.int64)
        is_common = np.zeros(size, dtype=bool)
        is_common[self.common_ids] = True
        self.id_of_number = np.concatenate([self.common_ids, np.flatnonzero(~is_common)]).astype(np.int32)

    @classmethod
    def of(cls, ids_M: np.ndarray, size: int) -> Numbering:
        """Numbering by falling frequency of the ids that occur often, ties by lower id first."""
        counts = np.bincount(ids_M, minlength=1)
        order = np.argsort(-counts, kind="stable")
        return cls(order[counts[order] >= _LEAST_COUNT], size)

    @classmethod
    def decode(cls, text: str, size: int) -> Numbering:
        """Numbering from the text of :meth:`encode`.

        Raises:
            StoreCorruptError: the text is no list of distinct ids below ``size``.
        """
        try:
            ids = np.frombuffer(base64.b64decode(text, validate=True), dtype=_id_type(size)).astype(np.int64)
        except ValueError as error:
            raise StoreCorruptError(f"common_ids: expected base64 of numbers, found {error}.") from error
        if len(ids) and (ids.max() >= size or len(np.unique(ids)) < len(ids)):
            raise StoreCorruptError(f"common_ids: expected distinct ids below {size}, found others.")
        return cls(ids, size)

    def encode(self) -> str:
        """Base64 of the common ids, little-endian uint16 up to 65,536 numbers and uint32 beyond."""
        return base64.b64encode(self.common_ids.astype(_id_type(len(self.id_of_number))).tobytes()).decode("ascii")

    def numbers(self, ids_M: np.ndarray) -> np.ndarray:
        """Number of each id, int64 [M]."""
        number_of_id = np.empty(len(self.id_of_number), dtype=np.int64)
        number_of_id[self.id_of_number] = np.arange(len(self.id_of_number))
        return number_of_id[ids_M]


def _id_type(size: int) -> str:
    return "<u2" if size <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class PackedSets:
    """Sets as a shard keeps them, by rising number inside each set.

    Attributes:
        sizes_R: elements of each set.
        gaps_M: number − 1 − the number before it in the set (−1 before the first), at least 0.
        last_codes_R: largest code of each set, that of its least probable token.
        code_gaps_M: largest code − code.
        tops_R: place of the most probable token among those of the smallest code.
    """

    sizes_R: np.ndarray
    gaps_M: np.ndarray
    last_codes_R: np.ndarray
    code_gaps_M: np.ndarray
    tops_R: np.ndarray


def pack_sets(sizes_R: np.ndarray, ids_M: np.ndarray, codes_M: np.ndarray, numbering: Numbering) -> PackedSets:
    """Sets in the form of :class:`PackedSets`.

    Args:
        sizes_R: int64 [R], none is 0.
        ids_M: int [M], falling probability inside each set.
        codes_M: uint8 or uint16 [M], not falling inside a set.
        numbering: of the shard.
    """
    offsets = np.concatenate([[0], np.cumsum(sizes_R)])
    first_R, state_M = offsets[:-1], np.repeat(np.arange(len(sizes_R)), sizes_R)
    numbers_M = numbering.numbers(ids_M)
    key_M = (state_M << _NUMBER_BITS) | numbers_M
    order = np.argsort(key_M)
    rising_M, last_codes_R = numbers_M[order], codes_M[offsets[1:] - 1]
    gaps_M = np.diff(rising_M, prepend=-1) - 1
    gaps_M[first_R] = rising_M[first_R]
    # Tokens as probable as the first one by their codes, with a smaller number, stand before it in the sorted set.
    ahead_M = (codes_M == np.repeat(codes_M[first_R], sizes_R)) & (numbers_M < np.repeat(numbers_M[first_R], sizes_R))
    return PackedSets(
        sizes_R.astype(np.int32),
        gaps_M.astype(np.int32),
        last_codes_R,
        np.repeat(last_codes_R, sizes_R) - codes_M[order],
        np.bincount(state_M[ahead_M], minlength=len(sizes_R)).astype(np.int32),
    )


def unpack_sets(packed: PackedSets, numbering: Numbering) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 [R + 1], ids int32 [M] and codes [M] of the sets, by falling probability.

    By rising code, equal codes by rising number; then the most probable token changes places with the first one.

    Raises:
        StoreCorruptError: a number lies outside the numbering, or a size, code or place is impossible.
    """
    sizes_R = packed.sizes_R.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes_R)])
    if (sizes_R < 1).any() or offsets[-1] != len(packed.gaps_M) or offsets[-1] != len(packed.code_gaps_M):
        raise StoreCorruptError(
            f"set_sizes add up to {offsets[-1]} and are at least {sizes_R.min(initial=1)}, with {len(packed.gaps_M)} "
            f"set_gaps and {len(packed.code_gaps_M)} code_gaps."
        )
    first_R = offsets[:-1]
    ends_M = np.cumsum(packed.gaps_M.astype(np.int64))
    # 1 for each element before this one in the store is taken off again with the sum at the start of its set.
    start_R = ends_M[first_R] - packed.gaps_M[first_R] - (np.arange(len(sizes_R)) << (_NUMBER_BITS + _CODE_BITS))
    key_M = ends_M + np.arange(len(ends_M)) - np.repeat(start_R + first_R, sizes_R)
    codes_M = np.repeat(packed.last_codes_R, sizes_R)
    if (packed.gaps_M < 0).any() or (packed.code_gaps_M > codes_M).any():
        raise StoreCorruptError("A gap of numbers is below 0, or a gap of codes above the largest code of its set.")
    last = ends_M[offsets[1:] - 1] - ends_M[first_R] + packed.gaps_M[first_R] + sizes_R - 1
    if len(last) and last.max() >= len(numbering.id_of_number):
        raise StoreCorruptError(f"set_gaps reach the number {last.max()} of {len(numbering.id_of_number)} ids.")
    codes_M = codes_M - packed.code_gaps_M
    key_M += codes_M.astype(np.int64) << _NUMBER_BITS
    key_M.sort(kind="stable")  # the sort that profits from sets standing in order already
    ids_M = numbering.id_of_number[key_M & ((1 << _NUMBER_BITS) - 1)]
    codes_M = (key_M >> _NUMBER_BITS).astype(codes_M.dtype)  # the cast drops the state above the code
    moved = np.flatnonzero(packed.tops_R)
    if len(moved):
        first, top = first_R[moved], first_R[moved] + packed.tops_R[moved]
        if (packed.tops_R < 0).any() or (top >= offsets[moved + 1]).any() or (codes_M[top] != codes_M[first]).any():
            raise StoreCorruptError("set_tops point at a token that is not among the most probable of its set.")
        ids_M[first], ids_M[top] = ids_M[top], ids_M[first]
    return offsets, ids_M, codes_M
