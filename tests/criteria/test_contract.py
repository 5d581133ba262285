"""Every criterion keeps the published contract."""

from __future__ import annotations

import pytest

import secateur as sc
from secateur.testing import check_criterion

CRITERIA = [
    sc.Magnitude(),
    sc.Magnitude(norm=2),
    sc.Random(3),
    sc.Taylor(),
    sc.TaylorSquared(),
    sc.TaylorGroup(),
    sc.OBD(),
    sc.OBD(sc.HutchinsonDiagonal(probes=2)),
    sc.OBD(sc.ExactDiagonal()),
    sc.SNIP(),
    sc.GraSP(),
    sc.SynFlow(),
    sc.Wanda(),
    sc.RIA(),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_members_keep_the_contract(criterion: sc.Criterion) -> None:
    check_criterion(criterion)


def test_the_contract_finds_a_criterion_that_writes_into_the_weight() -> None:
    class Careless:
        needs = ()
        rounds = 1

        def __call__(self, weight, stats):  # type: ignore[no-untyped-def]
            return weight.abs_()

    with pytest.raises(AssertionError):
        check_criterion(Careless())
