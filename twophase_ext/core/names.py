"""Parameter names as the user wrote them, whatever wraps the model."""

WRAPPERS = ("module", "_orig_mod")  # of (Distributed)DataParallel and of torch.compile


def canonical_name(name: str) -> str:
    """The name without the components that wrapping a module adds."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
