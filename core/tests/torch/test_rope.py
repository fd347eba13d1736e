"""The angles by which kept keys are turned."""

import torch
from torch import nn

from kvdock.rope import make_rotation
from kvdock.testing_models import tiny_model


class Elsewhere(nn.Module):
    """A rotary embedding that answers on the CPU whatever it is asked on."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, states, positions):
        return self.rotary(torch.zeros(()), positions.new_zeros(positions.shape, device="cpu"))


def test_angles_come_to_the_device_of_the_keys():
    model = tiny_model("llama")
    elsewhere = type("ElsewhereRotaryEmbedding", (Elsewhere,), {})
    model.model.rotary_emb = elsewhere(model.model.rotary_emb)
    rotate, reason = make_rotation(model, (0, 1))
    assert rotate is not None, reason
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    # meta stands for a second device: operations on two devices fail there as on two GPUs
    key = torch.empty(2, heads, 3, dim, device="meta")
    turned = rotate(key, torch.zeros(2, 3, dtype=torch.long, device="meta"), 1)
    assert turned.device == key.device
    assert turned.shape == key.shape
