"""When requests that do not draft are looked at again."""

import numpy as np
import pytest

from vllm_dspark.verification.ledger import Ledger
from vllm_dspark.verification.probing import Probing


def test_a_trial_puts_off_the_next_look_and_drafting_that_pays_does_not():
    probing, slots = Probing(), np.arange(2)
    probing.decided(slots, slots, 10)
    assert probing.wake(slots, 10, alone=False) > 100, "who drafts needs no look"
    probing.decided(slots, slots[:0], 20)
    assert probing.wake(slots, 20, alone=False) == 22
    for now, due in ((30, 34), (40, 48), (50, 66)):
        probing.decided(slots, slots, now, pays=False)
        assert probing.wake(slots, now, alone=False) == due


def test_a_probe_that_cannot_be_paid_waits_until_it_can():
    ledger = Ledger()
    ledger.begin(0.010)
    ledger.credit = -0.004
    waits = ledger.rounds_until(0.004)
    for _ in range(waits):
        assert ledger.credit < 0.004
        ledger.spent(0.010, 0.010)
    assert ledger.credit == pytest.approx(0.004)
    assert ledger.rounds_until(0.004) <= 1


@pytest.mark.parametrize(("credit", "wait"), [(0.01101, 25), (0.002, 64), (0.0119, 8)])
def test_the_wait_for_a_probes_price_is_neither_long_nor_short(credit, wait):
    ledger, probing, slots = Ledger(), Probing(), np.arange(2)
    ledger.begin(0.010)
    ledger.credit = credit
    probing.last[slots] = 0
    chosen, _ = probing.select(slots, slots, 5, lambda count: 0.004 * count, ledger, alone=True)
    assert chosen.size == 0
    assert probing.fleet_due == 5 + wait
