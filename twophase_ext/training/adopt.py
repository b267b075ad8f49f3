"""A branch taken from its trunk before tau."""

from .persistence import checkpoint, optimizer_state
from .run import Run


def adopt(run: Run, trunk: Run, same: bool) -> None:
    """Let `run` go on from where `trunk` stands, before its tau; the models are the same.

    same: the optimizer comes from the trunk's callable, and becomes what the trunk's is. Another
    of the same class and groups takes over the trunk's state and settings, but for those that its
    own callable gives otherwise than the trunk's did; where the class is another, it begins anew.
    """
    run.state.epoch, run.state.history = (
        trunk.state.epoch,
        [dict(row) for row in trunk.state.history],
    )
    run.state.timings = dict(trunk.state.timings)
    run.context.averaged.kept = {name: y.clone() for name, y in trunk.context.averaged.kept.items()}
    run.context.schedule.follow(trunk.context.schedule, run.state.history)
    models = run.context.network.model, trunk.context.network.model
    if same and optimizer_state.become(run.context.optimizer, trunk.context.optimizer, *models):
        run.context.schedule.load(trunk.context.schedule.state())
    else:
        _take_over(run, trunk, same)
    run.context.base_step.load(trunk.context.base_step.state())


def _take_over(run: Run, trunk: Run, same: bool) -> None:
    """The trunk's state and settings, but for those that the own callable gives otherwise."""
    packed, own = (
        optimizer_state.pack(r.context.optimizer, r.context.network.model.named_parameters())
        for r in (trunk, run)
    )
    kinds = [optimizer_state.kind(r.context.optimizer) for r in (trunk, run)]
    if kinds[0] != kinds[1] or packed["order"] != own["order"]:
        if same:
            raise ValueError(
                f"optimizer: expected the callable to give the same optimizer for each branch, got "
                f"{kinds[0]} and {kinds[1]}, or its parameters in other groups"
            )
        run.context.averaged.kept = {}
        return
    now = [dict(group) for group in run.context.optimizer.param_groups]
    optimizer_state.load(
        run.context.optimizer, packed, run.context.network.model.named_parameters()
    )
    if same:
        run.context.schedule.load(trunk.context.schedule.state())
        return
    firsts = run.context.schedule.first, trunk.context.schedule.first
    for group, mine, first, theirs in zip(
        run.context.optimizer.param_groups, now, *firsts, strict=True
    ):
        for key, value in mine.items():
            # what is not in `first` is the scheduler's, which has followed with the own rates
            equal = key in first and checkpoint.digest(first[key]) == checkpoint.digest(
                theirs.get(key)
            )
            if key != "params" and not equal:
                group[key] = value
