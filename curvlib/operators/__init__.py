"""Symmetric linear operators on R^D: the structures that curvature matrices have. Pure linear algebra.

=================================  ========================================================================
:class:`Identity`                  I
:class:`Diagonal`                  diag(v)
:class:`Dense`                     a full matrix
:class:`BlockDiagonal`             blocks of any kind on disjoint coordinates
:class:`Kronecker`                 F_1 (x) ... (x) F_k
:class:`KroneckerEigen`            (Q_1 (x) ... (x) Q_k) diag(e) (Q_1 (x) ... (x) Q_k)^T
:class:`KroneckerStack`            equally sized blocks Kronecker on consecutive coordinates
:class:`KroneckerEigenStack`       equally sized blocks KroneckerEigen on consecutive coordinates
:class:`KroneckerCongruence`       N^T diag(e) N, N a sum of Kronecker products
:class:`SymmetricKroneckerChain`   sum_d r_d A_d (x) G_d over lags d, symmetric transitions
:class:`GeneralKroneckerChain`     sum_d A_d (x) G_d over all lags d, any transitions
:class:`KroneckerMarkovChain`      Xi^-1 Sigma Xi^-T of Kronecker products: its inverse is block tridiagonal
:class:`KroneckerMarkovPrecision`  Xi^T diag(C_1, ..., C_l) Xi
:class:`LowRank`                   U diag(w) U^T + diag(d)
:class:`MatrixFree`                products alone
:class:`Scaled`                    factor * C
:class:`Sum`                       C_1 + ... + C_n
:class:`Shifted`                   C + shift I
:class:`CholeskyInverse`           (L L^T)^-1
=================================  ========================================================================
"""

from curvlib.operators.base import LinearOperator, Scaled, Sum
from curvlib.operators.block_diagonal import BlockDiagonal
from curvlib.operators.dense import CholeskyInverse, Dense
from curvlib.operators.diagonal import Diagonal, Identity, Shifted
from curvlib.operators.kronecker import Kronecker, KroneckerEigen
from curvlib.operators.kronecker_chain import GeneralKroneckerChain, SymmetricKroneckerChain
from curvlib.operators.kronecker_congruence import KroneckerCongruence
from curvlib.operators.kronecker_stack import KroneckerEigenStack, KroneckerStack
from curvlib.operators.low_rank import LowRank
from curvlib.operators.markov_chain import KroneckerMarkovChain, KroneckerMarkovPrecision
from curvlib.operators.matrix_free import MatrixFree
from curvlib.operators.precision import full_precision
from curvlib.operators.state import OperatorError, operator_from_state_dict

__all__ = [
    "BlockDiagonal",
    "CholeskyInverse",
    "Dense",
    "Diagonal",
    "GeneralKroneckerChain",
    "Identity",
    "Kronecker",
    "KroneckerCongruence",
    "KroneckerEigen",
    "KroneckerEigenStack",
    "KroneckerMarkovChain",
    "KroneckerMarkovPrecision",
    "KroneckerStack",
    "LinearOperator",
    "LowRank",
    "MatrixFree",
    "OperatorError",
    "Scaled",
    "Shifted",
    "Sum",
    "SymmetricKroneckerChain",
    "full_precision",
    "operator_from_state_dict",
]
