"""What others compute of a trained network: the table of docs/deploy.md.

    python bench/deploy.py [CONSUMER ...]

Each consumer gets the network as it is and as `tp.nn.plain` makes it, in the ways that the table
names; shown is the largest difference from the network in PyTorch, relative to the largest output
of the sample, for an MLP on inputs of lengths 0.1 to 100 and a small PreActResNet18. For DeepLift
and SHAP it is the gap of additivity, relative to the largest output. A consumer that is not
installed is left out.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase.models import PreActResNet18

Net = tuple[nn.Module, Tensor]


def mlp() -> Net:
    """Two softplus layers, with inputs of very different lengths."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), tp.nn.Softplus(), nn.Linear(32, 64), tp.nn.Softplus(10.0)
    ).append(nn.Linear(64, 3))
    return model.eval(), torch.randn(4, 20) * torch.logspace(-1, 2, 4)[:, None]


def cnn() -> Net:
    """A PreActResNet18 whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = PreActResNet18(1, 10, width=4, wide=40)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, 1, 16, 16))
    return model.eval(), torch.randn(4, 1, 16, 16)


def _exported(model: nn.Module, x: Tensor) -> Any:
    ours = torch._decomp.get_decompositions([torch.ops.twophase.softplus.default])
    table = {**torch.export.default_decompositions(), **ours}
    return torch.export.export(model, (x,)).run_decompositions(table)


def _session(file: Path | str, x: Tensor) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def _onnx(model: nn.Module, x: Tensor, folder: Path) -> Path:
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(folder / "a.onnx")
    return folder / "a.onnx"


def _onnx_legacy(model: nn.Module, x: Tensor, folder: Path) -> Any:
    torch.onnx.export(model, (x,), folder / "b.onnx", dynamo=False)
    return _session(folder / "b.onnx", x)


def _onnx_quantized(model: nn.Module, x: Tensor, folder: Path) -> Any:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_onnx(model, x, folder), folder / "q.onnx")
    return _session(folder / "q.onnx", x)


def _openvino(model: nn.Module, x: Tensor, _: Path) -> Any:
    import openvino

    found = openvino.convert_model(_exported(model, x))
    return openvino.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]


def _openvino_module(model: nn.Module, x: Tensor, _: Path) -> Any:
    import openvino

    found = openvino.convert_model(model, example_input=x)
    return openvino.compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]


def _executorch(model: nn.Module, x: Tensor, _: Path) -> Any:
    """Its portable kernels."""
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    program = to_edge(_exported(model, x)).to_executorch()
    return Runtime.get().load_program(program.buffer).load_method("forward").execute([x])[0]


def _xnnpack(model: nn.Module, x: Tensor, _: Path) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(
        _exported(model, x), partitioner=[XnnpackPartitioner()]
    ).to_executorch()
    return Runtime.get().load_program(lowered.buffer).load_method("forward").execute([x])[0]


def _aot_inductor(model: nn.Module, x: Tensor, folder: Path) -> Any:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    path = str(folder / "model.pt2")
    aoti_compile_and_package(torch.export.export(model, (x,)), package_path=path)
    return aoti_load_package(path)(x)


def _quantize_fx(model: nn.Module, x: Tensor, _: Path) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return convert_fx(prepared)(x)


class _Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _nncf(model: nn.Module, x: Tensor, _: Path) -> Any:
    """In a module around it: NNCF puts its hooks among the model's children, where an
    nn.Sequential calls them.
    """
    import nncf

    return nncf.quantize(_Holder(model), nncf.Dataset([x]), subset_size=1)(x)


def _fused(model: nn.Module, x: Tensor, _: Path) -> Any:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)(x)


def _deep_lift(model: nn.Module, x: Tensor, _: Path) -> float:
    from captum.attr import DeepLift

    gap = DeepLift(model).attribute(x, target=1, return_convergence_delta=True)[1].abs().max()
    return float(gap / model(x).abs().max())


def _shap(model: nn.Module, x: Tensor, _: Path) -> float:
    import shap

    found = shap.DeepExplainer(model, x).shap_values(x[:2], check_additivity=False)
    y = model(x).detach()
    told = np.asarray(found).reshape(2, -1, y.shape[1]).sum(1)
    return float(np.abs(told - (y[:2] - y.mean(0)).numpy()).max() / y.abs().max())


CONSUMERS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], Any]]] = {
    "torch.jit.script": ("torch", lambda m, x, _: torch.jit.script(m)(x)),
    "torch.jit.trace": ("torch", lambda m, x, _: torch.jit.trace(m, x)(x)),
    "torch.fx": ("torch", lambda m, x, _: torch.fx.symbolic_trace(m)(x)),
    "torch.fx, conv-BN fusion": ("torch", _fused),
    "torch.export": ("torch", lambda m, x, _: torch.export.export(m, (x,)).module()(x)),
    "torch.export, decomposed": ("torch", lambda m, x, _: _exported(m, x).module()(x)),
    "quantize_fx, int8": ("torch", _quantize_fx),
    "ONNX Runtime": ("onnxruntime", lambda m, x, folder: _session(_onnx(m, x, folder), x)),
    "ONNX Runtime, dynamo=False": ("onnxruntime", _onnx_legacy),
    "ONNX Runtime, int8": ("onnxruntime", _onnx_quantized),
    "OpenVINO, of the export": ("openvino", _openvino),
    "OpenVINO, of the module": ("openvino", _openvino_module),
    "ExecuTorch, portable kernels": ("executorch", _executorch),
    "ExecuTorch, XNNPACK": ("executorch", _xnnpack),
    "AOTInductor": ("torch", _aot_inductor),
    "NNCF, int8": ("nncf", _nncf),
    "captum DeepLift": ("captum", _deep_lift),
    "shap DeepExplainer": ("shap", _shap),
}


def difference(name: str, model: nn.Module, given: nn.Module, x: Tensor) -> float:
    """Of what the consumer makes of `given` and the model, over the sample's largest output; or the
    consumer's own gap.
    """
    with torch.no_grad():
        truth = model(x).numpy()
    with tempfile.TemporaryDirectory() as folder:
        found = CONSUMERS[name][1](given, x, Path(folder))
    if isinstance(found, float):
        return found
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    return float((np.abs(found - truth) / np.abs(truth).max(1, keepdims=True)).max())


def cell(name: str, make: Callable[[], Net], form: Callable[[nn.Module], nn.Module]) -> str:
    """`difference`, or what the consumer raised."""
    model, x = make()
    try:
        return f"{difference(name, model, form(model), x):.1e}"
    except Exception as error:  # of any package
        return type(error).__name__


def main(names: list[str]) -> None:
    """Print the table, row by row."""
    print("| consumer | version | MLP as it is | plain | CNN as it is | plain |")
    print("|---|---|---|---|---|---|")
    for name in names or CONSUMERS:
        try:
            known = version(CONSUMERS[name][0])
        except PackageNotFoundError:
            continue
        forms: list[Callable[[nn.Module], nn.Module]] = [lambda model: model, tp.nn.plain]
        cells = [cell(name, make, form) for make in (mlp, cnn) for form in forms]
        print(f"| {name} | {known} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
