"""Woodbury's inverse of low rank plus diagonal, with its orthogonal complement."""

import torch
from linear_systems import dense_inverse
from operator_cases import close, draw

from curvlib.operators import (
    LowRank,
)
from curvlib.solvers.inverse import damped_inverse


class TestLowRank:
    def test_the_orthogonal_complement_stays(self, device):
        d = draw(0, device)
        U = torch.linalg.qr(d.normal(50, 3)).Q
        C = LowRank(U, d.values(3), torch.zeros(50, dtype=d.dtype, device=device))
        b = d.normal(50)
        b = b - U @ (U.T @ b)
        close(damped_inverse(C, 1e-3) @ b, b / 1e-3, tolerance=1e-11)

    def test_an_inverse_of_an_inverse(self):
        d = draw(0)
        C = LowRank(d.normal(6, 2), d.values(2), d.values(6) + 0.5)
        inverse = damped_inverse(C, 0.0)
        assert (inverse.weights < 0).all()
        close(damped_inverse(inverse, 0.0).to_dense(), C.to_dense(), 1.0, 1e-11)

    def test_collinear_columns_and_a_small_damping_in_float32(self, device):
        d = draw(0, device)
        U = d.normal(40, 3)
        U = torch.cat([U, U[:, :1], 1e-3 * U], dim=1).float()
        C = LowRank(U, torch.ones(7, device=device), torch.zeros(40, device=device))
        b = d.normal(40).float()
        exact = dense_inverse(U.double() @ U.double().T, 1e-5) @ b.double()
        x = damped_inverse(C, 1e-5) @ b
        assert (x.double() - exact).norm() / exact.norm() < 1e-5

    def test_many_coordinates_need_no_full_matrix(self):
        U = draw(0, "cpu", dtype=torch.float32).normal(200_000, 2)
        C = LowRank(U, torch.ones(2), torch.full((200_000,), 0.1))
        b = torch.ones(200_000)
        x = (damped_inverse(C, 0.1) @ b).double()
        residual = U.double() @ (U.double().T @ x) + 0.2 * x - b
        assert residual.norm() / b.norm() < 1e-3

    def test_a_right_hand_side_in_the_range_of_the_factor_keeps_its_digits_in_float32(self, device):
        d = draw(0, device)
        U = 1e3 * torch.linalg.qr(d.normal(30, 2)).Q.float()
        C = LowRank(U, torch.ones(2, device=device), torch.zeros(30, device=device))
        b = U @ torch.ones(2, device=device)
        exact = dense_inverse(U.double() @ U.double().T, 1.0) @ b.double()
        x = damped_inverse(C, 1.0) @ b
        assert x.dtype == torch.float32
        assert (x.double() - exact).norm() / exact.norm() < 1e-6
