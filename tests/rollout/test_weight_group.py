"""Weights through a process group of gloo, whose members are threads here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from mrpo.rollout.weight_group import WeightGroup, find_store, open_store, own_address

T = TypeVar("T")
CPU = torch.device("cpu")
SIZE = 3


def together(act: Callable[[int], T], members: int = SIZE) -> list[T]:
    with ThreadPoolExecutor(members) as threads:
        return [future.result(timeout=60) for future in [threads.submit(act, rank) for rank in range(members)]]


@pytest.fixture
def groups() -> list[WeightGroup]:
    store = open_store(SIZE)

    def join(rank: int) -> WeightGroup:
        found = store if rank == 0 else find_store("127.0.0.1", store.port, SIZE)
        return WeightGroup(found, rank, SIZE, CPU, address="127.0.0.1", seconds=20)

    return together(join)


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "plain": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "number": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "whole ü": torch.arange(5),
        "flag": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_everyone_gets_every_bit(groups: list[WeightGroup], limit: int) -> None:
    for seed in (0, 1):  # a group is there for many updates
        weights = make_weights(seed)

        def act(rank: int, weights: dict[str, torch.Tensor] = weights) -> dict[str, torch.Tensor]:
            if rank == 0:
                groups[0].send(weights.items(), limit)
                return {}
            return {name: tensor.clone() for name, tensor in groups[rank].receive()}

        for found in together(act)[1:]:
            assert list(found) == list(weights)
            for name, tensor in weights.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), name


def test_a_weight_is_copied_before_the_next_is_asked_for(groups: list[WeightGroup]) -> None:
    gathered = torch.empty(4)

    def act(rank: int) -> list[float]:
        if rank == 0:
            groups[0].send((f"w{i}", gathered.fill_(float(i))) for i in range(5))
            return []
        return [float(tensor.sum()) for _, tensor in groups[rank].receive()]

    assert together(act)[1:] == [[0.0, 4.0, 8.0, 12.0, 16.0]] * 2


def test_a_parameter_is_sent_without_its_graph(groups: list[WeightGroup]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))

    def act(rank: int) -> list[tuple[str, torch.Tensor]]:
        if rank == 0:
            groups[0].send([("w", parameter)])
            return []
        return list(groups[rank].receive())

    for found in together(act)[1:]:
        assert not found[0][1].requires_grad
        assert torch.equal(found[0][1], parameter)


def test_a_member_that_does_not_come_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        WeightGroup(open_store(2), 0, 2, CPU, address="127.0.0.1", seconds=0.5)


def test_the_way_to_this_host_is_its_loopback() -> None:
    assert own_address("127.0.0.1", 9) == "127.0.0.1"
