"""The network inside what people wrap around it."""

from typing import cast

from torch import jit, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile, else `model` itself.

    Raises TypeError for what is no module, and for modules that cannot be differentiated as functions of their
    parameters: of torch.jit, without a hash, with uninitialized parameters, or with a flat parameter in place of their
    own."""
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, _WRAPPERS):
            model = cast(nn.Module, model.module)  # checked in the next turn
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)  # of torch.compile
        else:
            break
    _refuse_unhashable(model)
    if any(isinstance(m, jit.ScriptModule) for m in model.modules()):
        raise TypeError("model holds a torch.jit.ScriptModule; give the Python module that it was made from")
    if any(map(is_lazy, model.parameters())):
        raise TypeError("model has parameters that are not initialized; call it once on images first")
    if [name for name, _ in model.named_parameters()] == ["flat_param"] and isinstance(
        getattr(model, "module", None), nn.Module
    ):
        raise TypeError("model is a ReparamModule, which takes its parameters as flat_param; pass the network inside")
    return model


def _refuse_unhashable(model: nn.Module) -> None:
    kind = type(model)
    if kind.__hash__ is None:
        raise TypeError(
            f"model holds a module of class {kind.__name__}, which defines __eq__ without __hash__, so that torch "
            "cannot list its parameters; add the line __hash__ = torch.nn.Module.__hash__ to the class"
        )
    for child in model._modules.values():
        if child is not None:
            _refuse_unhashable(child)
