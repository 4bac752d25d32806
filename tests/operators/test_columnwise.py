"""MatrixFree with a function of one vector at a time."""

import torch

from curvlib.operators import MatrixFree


def test_a_columnwise_function_sees_contiguous_vectors_only():
    A, seen = torch.randn(4, 4).double(), []

    def product(v):
        seen.append((v.shape, v.is_contiguous()))
        return (A + A.T) @ v

    C = MatrixFree(product, 4, torch.float64, columnwise=True)
    V = torch.randn(4, 3).double()
    torch.testing.assert_close(C @ V, (A + A.T) @ V)
    torch.testing.assert_close(C @ V[:, 0], (A + A.T) @ V[:, 0])
    torch.testing.assert_close(C.to_dense(), A + A.T)
    assert len(seen) == 3 + 1 + 4
    assert {shape for shape, _ in seen} == {torch.Size([4])}
    assert all(contiguous for (_, contiguous) in seen[:3])
