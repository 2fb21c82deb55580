"""TESLA's estimate of the gradient of unrolled SGD (arXiv 2211.10586), beside the exact one.

The estimate holds each theta_i fixed: in the recursion of adjoint.py it leaves out h, the derivative of a step's
gradient along lambda with respect to theta_i. Then lambda stays dL/dtheta_N at every step, and the derivative with
respect to the images alone is computed. It costs less than the exact gradient and is close to it only while learning
rate and number of steps are small. Its only trace in the engines is therefore what a step is asked for.
"""

from dataclasses import dataclass

GRADIENTS = ("exact", "tesla")


@dataclass(frozen=True)
class Wanted:
    """Of which inputs of a step a derivative is wanted."""

    parameters: bool
    images: bool
    labels: bool


def wanted_of_step(gradient: str, i: int, needs: tuple[bool, ...]) -> Wanted:
    """What the derivative of step i is asked for. gradient: one of GRADIENTS. needs: whether each of
    `Inputs` needs a gradient."""
    start, images, labels = needs[:3]
    return Wanted(gradient == "exact" and (i > 0 or start), images, labels)
