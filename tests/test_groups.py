"""Groups of equal inputs, against a comparison of all pairs."""

import numpy as np
import pytest
import torch

from twophase_ext.model.groups import Grouping, firsts, groups_of, repeated


def _by_pairs(x: torch.Tensor) -> list[int]:
    """The specification: the first sample that is the same numbers, and its number."""
    seen: list[torch.Tensor] = []
    numbers = []
    for row in x:
        same = [k for k, other in enumerate(seen) if bool((row == other).all())]
        numbers.append(same[0] if same else len(seen))
        if not same:
            seen.append(row)
    return numbers


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8],
)
@pytest.mark.parametrize("shape", [(300, 2), (300,), (300, 1, 2, 1)])
def test_the_numbers_are_those_of_a_comparison_of_all_pairs(dtype, shape):
    x = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.transpose(0, -1).contiguous().transpose(0, -1)  # strides of another order
    groups = groups_of(x)
    assert groups.tolist() == _by_pairs(x)
    n = int(groups.max()) + 1
    assert n < len(x)  # some repeat
    first = firsts(groups)
    assert first.tolist() == [groups.tolist().index(k) for k in range(n)]
    assert torch.equal(x[first][groups], x)
    found = repeated(groups)
    assert all(len(group) > 1 and group == sorted(group) for group in found)
    assert sum(len(group) - 1 for group in found) == len(x) - n
    assert all(len(set(groups[group].tolist())) == 1 for group in found)


def test_equal_is_equal_as_real_numbers_and_no_closer():
    tiny = 2.0**-1074
    x = torch.tensor([[0.0], [-0.0], [tiny], [-tiny], [1.0], [1.0 + 2.0**-52]], dtype=torch.float64)
    assert groups_of(x).tolist() == [0, 0, 1, 2, 3, 4]
    assert groups_of(x.float()).tolist() == [0, 0, 0, 0, 1, 1]  # as a float32 model is fed
    assert groups_of(np.array([[0.5, -0.0], [0.5, 0.0]])).tolist() == [0, 0]
    assert groups_of([[1, 2], [2, 1], [1, 2]]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_real_number_is_refused_with_its_sample(value):
    x = torch.zeros(5, 2)
    x[3, 1] = value
    with pytest.raises(ValueError, match=r"x: NaN or infinity in the input of sample 3"):
        groups_of(x)
    grouping = Grouping()
    grouping.add(x[:2])
    with pytest.raises(ValueError, match="sample 3"):
        grouping.add(x[2:])


def test_several_inputs_are_equal_where_all_of_them_are():
    ids = torch.tensor([[1, 2], [1, 2], [1, 2], [3, 2]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    assert groups_of({"input_ids": ids, "attention_mask": mask}).tolist() == [0, 1, 0, 2]
    assert groups_of((ids, torch.tensor([0.0, 0.5, -0.0, 0.0]))).tolist() == [0, 1, 0, 2]
    with pytest.raises(ValueError, match="one length"):
        groups_of((ids, mask[:3]))


def test_batches_count_on_and_forms_differ():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    grouping = Grouping()
    for part in (x[:1], x[1:1], x[1:]):
        grouping.add(part)
    assert grouping.index().tolist() == [0, 1, 0, 2]
    grouping.add(x[:1].reshape(1, 1, 2))  # the same numbers in other places
    grouping.add(x[:1].view(torch.int32))
    assert grouping.index().tolist() == [0, 1, 0, 2, 3, 4]


def test_empty_sets_and_empty_inputs():
    assert groups_of(torch.zeros(0, 3)).tolist() == []
    assert firsts(groups_of(torch.zeros(0, 3))).tolist() == []
    assert repeated(groups_of(torch.zeros(0, 3))) == []
    assert groups_of(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="got a scalar"):
        groups_of(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x:"):
        groups_of("abc")
