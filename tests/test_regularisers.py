"""Each φ: its shape, its scale, its tangent, and an independent formula."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.losses import phi_value
from torch import Tensor

from tdistill.errors import DomainError
from tdistill.regularisers import PhiName, Regulariser

NAMES = get_args(PhiName)
every_phi = pytest.mark.parametrize("name", NAMES)


def value(phi: Regulariser, x: float) -> float:
    return float(phi(torch.tensor([x], dtype=torch.float64))[0])


def slope(phi: Regulariser, x: float) -> float:
    at = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    phi(at)[0].sum().backward()
    return float(at.grad)


@every_phi
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_value_0_and_slope_1_at_0(name, scale):
    phi = Regulariser(name, scale)
    assert value(phi, 0.0) == 0.0
    assert slope(phi, 0.0) == 1.0


@every_phi
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    low=st.floats(-60, 60),
    width=st.floats(1e-3, 40),
    weight=st.floats(0, 1),
    scale=st.floats(0.2, 30),
    tv_slope=st.floats(0, 1),
)
def test_concave_everywhere(name, low, width, weight, scale, tv_slope):
    phi = Regulariser(name, scale, tv_slope=tv_slope)
    middle = weight * low + (1 - weight) * (low + width)
    chord = weight * value(phi, low) + (1 - weight) * value(phi, low + width)
    assert value(phi, middle) >= chord - 1e-9 * (1 + abs(chord))


@every_phi
@pytest.mark.parametrize("max_slope", [None, 1.5, 9.0])
@pytest.mark.parametrize("scale", [0.4, 1.0, 7.0])
def test_agrees_with_the_formula(name, max_slope, scale):
    phi = Regulariser(name, scale, max_slope, tv_slope=0.3)
    for x in (-500.0, -20.0, -3.0, -1.0, -0.6, -0.2, 0.0, 0.1, 0.9, 4.0, 50.0):
        assert value(phi, x) == pytest.approx(phi_value(name, x, scale, max_slope, 0.3), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["chi2", "reverse_kl", "hellinger", "jensen_shannon"])
@pytest.mark.parametrize("max_slope", [2.0, 4.0, 30.0])
def test_the_tangent_continues_value_and_slope(name, max_slope):
    phi = Regulariser(name, 2.5, max_slope)
    at = phi.tangent_point
    assert at < 0
    assert value(phi, at - 1e-9) == pytest.approx(value(phi, at + 1e-9), abs=1e-7)
    assert slope(phi, at + 1e-9) == pytest.approx(max_slope, rel=1e-6)
    assert slope(phi, at - 1e-9) == slope(phi, at - 1e6) == max_slope
    where = phi(torch.tensor([at - 1, at + 1, 3.0], dtype=torch.float64))[1]
    assert where.tolist() == [True, False, False]


def test_tangent_points_by_hand():
    # e^{−x} = 4; 1/(1+x)² = 4; u/(2−u) = 4 at u = e^{−x} = 8/5; 1 − x/2 = 4.
    assert Regulariser("reverse_kl").tangent_point == pytest.approx(-math.log(4))
    assert Regulariser("hellinger").tangent_point == pytest.approx(-0.5)
    assert Regulariser("jensen_shannon").tangent_point == pytest.approx(-math.log(1.6))
    assert Regulariser("chi2", max_slope=4.0).tangent_point == -6.0
    assert Regulariser("chi2").tangent_point == -math.inf
    assert Regulariser("hellinger", scale=10.0).tangent_point == pytest.approx(-5.0)


def test_chi2_is_the_papers():
    assert value(Regulariser("chi2", 0.1), -1.0) == pytest.approx(-1 - 1 / 0.4)


@every_phi
def test_an_infinite_scale_is_the_identity(name):
    phi = Regulariser(name, math.inf)
    x = torch.linspace(-30, 30, 13, dtype=torch.float64)
    assert phi.is_identity
    assert torch.equal(phi(x)[0], x)


@every_phi
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_any_reward(name, dtype):
    x = torch.tensor([-1e6, -1e3, -1.0, -0.5, 1e3, 1e6], dtype=dtype, requires_grad=True)
    out: Tensor = Regulariser(name)(x)[0]
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()


@every_phi
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_the_non_linear_part_survives_in_float32(name, scale):
    """c φ(x/c) is x less a small part where c is large; x − φ is what the loss adds to the log-likelihood."""
    x = torch.linspace(-9, -0.5, 18, dtype=torch.float64)
    exact, found = (float((v - Regulariser(name, scale)(v)[0]).sum()) for v in (x, x.float()))
    assert found == pytest.approx(exact, rel=1e-4, abs=1e-12)


@every_phi
def test_gradcheck(name):
    x = torch.tensor([-9.0, -1.3, -0.44, -0.1, 0.2, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: Regulariser(name, 1.7)(v)[0], (x,))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"name": "chi3"}, "phi = 'chi3'"),
        ({"scale": 0.0}, "alpha = 0.0"),
        ({"max_slope": 1.0}, "max_slope = 1.0"),
        ({"tv_slope": 1.5}, "tv_slope = 1.5"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        Regulariser(**fields)
