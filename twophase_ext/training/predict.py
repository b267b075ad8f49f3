"""What a trained network says of inputs, and how well it does on labelled data."""

from typing import Any

import torch
from torch import Tensor, nn

from ..model.calling import dismiss, one_tensor, serve
from ..model.inputs import checked_inputs, first_parameter
from ..model.labels import Classes
from ..model.losses import ConvexLoss
from ..model.network import Network
from ..model.probing import DoesNotRun
from .checks import check_runs
from .data.samples import BATCH, Samples
from .measure import measure


@torch.inference_mode(False)
@torch.no_grad()
def outputs_of(model: nn.Module, x: Any) -> Tensor:
    """The model's outputs [n, ...] of the inputs x, in evaluation mode; see `Result.predict`."""
    parameter = first_parameter(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with one_tensor(model, x) as packed:
            parts = checked_inputs(packed).split(BATCH)
            return torch.cat([_outputs(model, part, parameter) for part in parts])
    finally:
        for module, mode in modes.items():
            module.training = mode


def _outputs(model: nn.Module, x: Tensor, parameter: Tensor) -> Tensor:
    x = x.to(parameter.device)
    if x.dtype == torch.uint8:
        x = x.to(parameter.dtype).div_(255)
    elif x.is_floating_point():
        x = x.to(parameter.dtype)
    try:
        return model(x)
    except Exception as error:  # whatever the user's own forward pass raises
        raise DoesNotRun(x, error) from error


@torch.inference_mode(False)
def score_of(
    model: nn.Module,
    loss: ConvexLoss,
    data: Any,
    last_layer: str | None,
    classes: Classes | None = None,
) -> tuple[float, float | None]:
    """(mean loss, accuracy or None) of the model over data; see `Result.score`."""
    parameter = first_parameter(model)
    place: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    samples = Samples.of(data, name="data", classes=classes, **place)
    if classes is not None and samples.classes is None:
        raise ValueError(f"data: expected labels that are text, {classes[0]!r}, got numbers")
    try:
        samples.form = serve(model, samples.packing, samples.example())
        network = Network(model, check_runs(model, samples), last_layer)
        with samples.held():
            samples.prepare(loss, network.outputs, network.last.rows)
            return measure(network, samples.objective, samples)[:2]
    finally:
        samples.close()
        dismiss(model)
