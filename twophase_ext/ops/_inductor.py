"""What torch's Inductor is told of operators that have a decomposition."""

import os
import sys
from typing import Any


def keep_whole(operator: Any) -> None:
    """Where the environment variable CI is set, Inductor asserts that what has a decomposition uses
    it; ours are for exporters, the operators themselves are faster. Said once Inductor is imported.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and os.environ.get("CI") and operator not in lowering.lowerings:
        lowering.make_fallback(operator, warn=False)
