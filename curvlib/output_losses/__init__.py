"""What curvature needs to know about a loss, in output space: gradient, Hessian, its square root, Fisher draws."""

from curvlib.output_losses.autograd import AutogradLoss
from curvlib.output_losses.base import NoTargetsError, OutputLoss, output_loss
from curvlib.output_losses.cross_entropy import CrossEntropy
from curvlib.output_losses.elementwise import MSE, BCEWithLogits, ElementwiseLoss
from curvlib.output_losses.likelihoods import GaussianNLL, PoissonNLL

__all__ = [
    "MSE",
    "AutogradLoss",
    "BCEWithLogits",
    "CrossEntropy",
    "ElementwiseLoss",
    "GaussianNLL",
    "NoTargetsError",
    "OutputLoss",
    "PoissonNLL",
    "output_loss",
]
