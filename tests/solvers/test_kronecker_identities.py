"""Identities of Kronecker products that the inverses rest on."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import CASES, close, draw

from curvlib.operators import (
    Dense,
    Kronecker,
)
from curvlib.solvers.inverse import damped_inverse, eigendecompose

seeds = st.integers(0, 2**32 - 1)


class TestKroneckerIdentities:
    """Properties of products of factors, by the structured operators alone."""

    @given(seed=seeds)
    @settings(max_examples=25)
    def test_mixed_product(self, seed):
        d = draw(seed, "cpu", definite=False)
        A, B, C, D = d.symmetric(3), d.symmetric(2), d.symmetric(3), d.symmetric(2)
        V = d.normal(6, 2)
        close(Kronecker((A, B)) @ (Kronecker((C, D)) @ V), torch.kron(A @ C, B @ D) @ V, 1.0, 1e-11)

    @given(seed=seeds)
    @settings(max_examples=25)
    def test_inverse_of_the_product_is_the_product_of_inverses(self, seed):
        d = draw(seed)
        A, B = (d.symmetric(n) + 0.1 * torch.eye(n, dtype=d.dtype) for n in (3, 2))
        expected = Kronecker(
            (Dense(damped_inverse(Dense(A), 0.0).to_dense()), Dense(damped_inverse(Dense(B), 0.0).to_dense()))
        )
        close(damped_inverse(Kronecker((A, B)), 0.0).to_dense(), expected.to_dense(), 1.0, 1e-9)

    @given(seed=seeds)
    @settings(max_examples=25)
    def test_symmetry_trace_and_determinant(self, seed):
        d = draw(seed)
        A, B = (d.symmetric(n) + 0.1 * torch.eye(n, dtype=d.dtype) for n in (3, 2))
        C = Kronecker((A, B))
        close(C.to_dense(), C.to_dense().T)
        close(C.trace(), A.trace() * B.trace())
        close(C.logdet(), 2 * torch.logdet(A) + 3 * torch.logdet(B), 1.0, 1e-11)

    @given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 5))
    @settings(max_examples=25)
    def test_vec_trick_in_row_major_order(self, seed, rows, columns):
        d = draw(seed, "cpu", definite=False)
        G, A, V = d.symmetric(rows), d.symmetric(columns), d.normal(rows, columns)
        close(Kronecker((G, A)) @ V.reshape(-1), (G @ V @ A).reshape(-1), 1.0, 1e-11)

    @given(seed=seeds)
    @settings(max_examples=25)
    def test_powers_by_the_eigendecomposition(self, seed):
        C, M = CASES["kronecker"](draw(seed))
        E = eigendecompose(C)
        close(E.map(torch.square).to_dense(), M @ M, 1.0, 1e-10)
        root = E.map(lambda e: e.clamp(min=0.0).sqrt()).to_dense()
        close(root @ root, M, 1.0, 1e-10)
        close(E.map(lambda e: (e + 0.5) ** -0.5).to_dense() @ (M + 0.5 * torch.eye(len(M), dtype=M.dtype)) @
              E.map(lambda e: (e + 0.5) ** -0.5).to_dense(), torch.eye(len(M), dtype=M.dtype), 1.0, 1e-10)  # fmt: skip

    @given(seed=seeds)
    @settings(max_examples=25)
    def test_eigenvectors_are_products_of_eigenvectors(self, seed):
        d = draw(seed)
        G, A = d.symmetric(3), d.symmetric(2)
        E = eigendecompose(Kronecker((G, A)))
        U = torch.kron(E.bases[0], E.bases[1])
        close(U.T @ U, torch.eye(6, dtype=d.dtype), 1.0, 1e-12)
        close(torch.kron(G, A) @ U, U * E.eigenvalues.reshape(-1), 1.0, 1e-11)
