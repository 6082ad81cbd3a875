"""Which attention kernel a machine gets."""

import pytest
import torch

from oneb.kernels.attention import SDP_BACKENDS, choose_backend


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "deterministic", "expected"), [
    ((9, 0), torch.bfloat16, 64, False, "cudnn"),
    ((10, 0), torch.bfloat16, 12, False, "cudnn"),
    ((9, 0), torch.bfloat16, 64, True, "flash"),
    ((9, 0), torch.bfloat16, 256, False, "flash"),
    ((8, 9), torch.float16, 64, False, "flash"),
    ((8, 0), torch.bfloat16, 512, False, "efficient"),
    ((9, 0), torch.float32, 64, False, "efficient"),
    ((7, 5), torch.float16, 64, False, "efficient"),
])
def test_a_cuda_card_gets_its_fastest_kernel(monkeypatch, capability, dtype, head_dim, deterministic, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert choose_backend(torch.device("cuda"), dtype, head_dim, deterministic) == expected
    assert expected in SDP_BACKENDS


def test_other_devices():
    assert choose_backend(torch.device("cpu"), torch.float32) == "cpu"
    assert choose_backend(torch.device("mps"), torch.float32) == "math"
