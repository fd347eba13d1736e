"""Attention of a window over keys of which some do not count."""

import pytest
import torch

from kvdock.kernels.window_scores import window_probabilities
from kvdock.policy import AttentionParams
from kvdock.testing_layers import random_states

pytestmark = pytest.mark.versionless


def attention(q, k, params, valid=None):
    return torch.cat([block for _, block in window_probabilities(q, k, params, valid)], dim=1)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 2.0, -1.0, 1.0])])
def test_keys_that_do_not_count_might_as_well_be_missing(softcap, sinks):
    q, k, _ = random_states(0, 2, 2, 2, 40, 16)
    params = AttentionParams(0.25, softcap, sinks)
    valid = torch.ones(2, 2, 40, dtype=torch.bool)
    valid[:, :, [3, 11, 30]] = False
    found = attention(q[:, :, -1:], k, params, valid)
    assert not found[..., [3, 11, 30]].any()
    kept = valid[0, 0]
    wanted = attention(q[:, :, -1:], k[:, :, kept], params)
    torch.testing.assert_close(found[..., kept], wanted)


def test_rows_and_heads_have_their_own_valid_keys():
    q, k, _ = random_states(1, 2, 3, 2, 30, 16)
    params, valid = AttentionParams(0.25), torch.rand(2, 3, 30) < 0.6
    valid[..., -5:] = True
    found = attention(q[:, :, -5:], k, params, valid)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, 2, 5))
    assert not found.masked_select(~valid[:, :, None, None]).any()


def test_one_query_sees_every_key():
    q, k, _ = random_states(2, 1, 2, 2, 30, 16)
    found = attention(q[:, :, -1:], k, AttentionParams(0.25))
    assert (found > 0).all()
    torch.testing.assert_close(found, attention(q[:, :, -3:], k, AttentionParams(0.25))[..., 2:, :])
