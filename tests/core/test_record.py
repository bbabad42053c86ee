"""What happened? The record of one update."""

import dataclasses
import json

import pytest

import wholebatch as wb

UPDATE = wb.Update(number=3, loss=0.5, targets=32, rows=8, micro_batches=2, lr=0.1, grad_norm=1.5)


def test_a_record_is_plain_values_in_the_order_of_its_fields():
    plain = UPDATE.to_dict()
    assert list(plain) == [field.name for field in dataclasses.fields(wb.Update)]
    assert json.loads(json.dumps(plain)) == plain
    assert plain["grad_norm"] == 1.5


def test_an_update_is_applied_unless_it_says_why_not():
    assert UPDATE.applied
    assert not dataclasses.replace(UPDATE, skipped="the loss is nan").applied


def test_a_record_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UPDATE.loss = 0.0
