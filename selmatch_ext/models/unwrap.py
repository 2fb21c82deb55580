"""The network inside what people wrap around it."""

from torch import jit, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile, else `model` itself.

    Raises TypeError for what is no module, and for modules that cannot be differentiated as functions of their
    parameters: of torch.jit, with uninitialized parameters, or with a flat parameter in place of their own."""
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # of torch.compile
        else:
            break
    if any(isinstance(m, jit.ScriptModule) for m in model.modules()):
        raise TypeError("model holds a torch.jit.ScriptModule; give the Python module that it was made from")
    if any(map(is_lazy, model.parameters())):
        raise TypeError("model has parameters that are not initialized; call it once on images first")
    if [name for name, _ in model.named_parameters()] == ["flat_param"] and isinstance(
        getattr(model, "module", None), nn.Module
    ):
        raise TypeError("model is a ReparamModule, which takes its parameters as flat_param; pass the network inside")
    return model
