"""The whole data set as one input: the nodes of a graph, and each row of the result a sample."""

from typing import Any

from torch import Tensor, nn

from .probing import main_output, require_module


class Rows(nn.Module):
    """index [b] -> model(*inputs, **named)[index]: samples are the rows of one evaluation.

    For networks whose samples meet: message passing over the nodes of a graph. The theorem is about
    such a function, too, as the inputs of a whole evaluation are fixed. inputs, named: what the
    model takes, tensors and anything else; tensors move with the module and are not in its state
    dict. The samples are then torch.arange(n), or those of them that have labels:

        backbone = tp.nn.Rows(GCN(...), features, edge_index)
        model = torch.nn.Sequential(backbone, torch.nn.Linear(channels, classes))

    A forward pass evaluates everything, whatever the batch.
    """

    def __init__(self, model: nn.Module, *inputs: Any, **named: Any) -> None:
        """Raises TypeError where `model` is no module."""
        super().__init__()
        require_module(model)
        self.model = model
        self._rest = dict(enumerate(inputs)) | named
        self._count = len(inputs)
        for key, value in list(self._rest.items()):
            if isinstance(value, Tensor):
                self.register_buffer(f"input_{key}", value, persistent=False)
                del self._rest[key]

    def forward(self, index: Tensor) -> Tensor:
        """index: int64 [b]. Returns the rows [b, ...]; TypeError where the model gives none."""
        given = self._rest | {
            key: getattr(self, f"input_{key}")
            for key in (*range(self._count), *self._names())
            if hasattr(self, f"input_{key}")
        }
        positional = [given[k] for k in range(self._count)]
        output = self.model(*positional, **{k: v for k, v in given.items() if isinstance(k, str)})
        rows = output if isinstance(output, Tensor) else main_output(output)
        if rows is None:
            raise TypeError(f"model: expected rows, got {type(output).__name__}")
        return rows[index]

    def _names(self) -> list[str]:
        own = [name.removeprefix("input_") for name in self._buffers]
        return [name for name in own if not name.isdigit()]
