"""What is looked at before a run: that the model takes the samples, and where it lives."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.messages import first_line
from ..model.probing import DoesNotRun, eager, main_output, untouched
from ..model.purity import require_pure
from .data.samples import Samples


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """The conversion to the training precision is undone where the arguments are refused."""
    parameters = [
        (p, p.data, p.grad, None if p.grad is None else p.grad.data) for p in model.parameters()
    ]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, data, grad, grad_data in parameters:
            parameter.grad = None
            parameter.data = data
            if grad is not None and grad_data is not None:
                grad.data = grad_data
                parameter.grad = grad
        for module, own in buffers:
            module._buffers.update(own)
        raise


def check_runs(model: nn.Module, samples: Samples) -> Tensor:
    """Run the model on two samples and return them.

    ValueError where it does not take such inputs.
    """
    x: Tensor = samples.example()
    try:
        require_pure(model, x)
    except DoesNotRun as error:
        whole = not (x.is_floating_point() or x.is_complex())
        advice = "; integers are not converted: make measurements floats (x.float())"
        raise ValueError(
            f"{samples.name}: the model does not run on inputs of shape "
            f"[n, {', '.join(map(str, x.shape[1:]))}] and {x.dtype}: {error.line}"
            f"{advice if whole else ''}"
        ) from error
    return x


def check_trains(model: nn.Module, example: Tensor, outputs: int, each: int = 1) -> None:
    """ValueError where training mode gives no output [b, m_y], alone or as a tuple's first.

    each: rows of a sample. example: two samples, or one. Nothing of the model has changed
    afterwards.
    """
    try:
        with untouched(model), eager(), torch.enable_grad():
            model.train()
            found = model(example)
    except Exception as error:  # whatever the user's own forward pass raises
        if len(example) < 2:  # BatchNorm has no variance over one sample
            return
        raise ValueError(
            f"model: it runs in evaluation mode, but not in training mode: {first_line(error)}"
        ) from error
    main = main_output(found)
    expected = [len(example) * each, outputs]
    if main is None or list(main.shape) != expected:
        first = "" if isinstance(found, Tensor) else f" a {type(found).__name__} with first"
        shape = type(main).__name__ if main is None else list(main.shape)
        raise ValueError(
            f"model: expected an output of shape {expected} in training mode, as in evaluation "
            f"mode, or a tuple that begins with it, got{first} {shape}"
        )


def check_single(model: nn.Module, example: Tensor) -> None:
    """ValueError where the model does not train on one sample, as a run's steps would ask."""
    try:
        with untouched(model), eager(), torch.enable_grad():
            model.train()
            model(example[:1])
    except Exception as error:  # BatchNorm has no variance over one sample
        raise ValueError(
            "batch_size: a step would be made on one sample, on which the model does not run in "
            f"training mode ({first_line(error)}); use batches of 2 or more"
        ) from error


def model_device(model: nn.Module, device: str | torch.device) -> torch.device:
    """The one device of the model's parameters; ValueError where it is not the one asked for."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if len(devices) > 1:
        found = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"model: expected all parameters on one device, got {found}")
    if not devices:
        raise ValueError("model: has no parameters")
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "model: it was made under torch.inference_mode, so that it cannot be trained; make it "
            "outside"
        )
    own = devices.pop()
    if device != "auto":
        asked = torch.device(device)
        if asked.type != own.type or (asked.index is not None and asked.index != own.index):
            raise ValueError(
                f"device: asked for {asked}, but the model is on {own}; move it first "
                f"(model.to({str(asked)!r})) or leave device='auto'"
            )
    return own
