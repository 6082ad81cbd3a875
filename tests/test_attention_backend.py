"""Which attention kernel a machine gets."""

import pytest
import torch

from oneb.kernels import attention
from oneb.kernels.attention import SDP_BACKENDS, choose_backend


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "deterministic", "expected"), [
    ((9, 0), torch.bfloat16, 64, False, "cudnn"),
    ((10, 0), torch.bfloat16, 12, False, "narrow"),
    ((8, 0), torch.float16, 32, False, "narrow"),
    ((9, 0), torch.bfloat16, 16, True, "narrow"),
    ((7, 5), torch.float16, 12, False, "efficient"),
    ((9, 0), torch.float32, 12, False, "efficient"),
    ((10, 0), torch.bfloat16, 40, False, "cudnn"),
    ((9, 0), torch.bfloat16, 64, True, "flash"),
    ((9, 0), torch.bfloat16, 256, False, "flash"),
    ((8, 9), torch.float16, 64, False, "flash"),
    ((8, 0), torch.bfloat16, 512, False, "efficient"),
    ((9, 0), torch.float32, 64, False, "efficient"),
    ((7, 5), torch.float16, 64, False, "efficient"),
])
def test_a_cuda_card_gets_its_fastest_kernel(monkeypatch, capability, dtype, head_dim, deterministic, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "cudnn_attention_runs", lambda device, dtype: True)
    monkeypatch.setattr(attention, "triton_available", lambda: True)
    assert choose_backend(torch.device("cuda"), dtype, head_dim, deterministic) == expected
    assert expected in SDP_BACKENDS


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "triton", "expected"), [
    ((9, 0), torch.bfloat16, 64, True, "narrow"), ((8, 0), torch.float16, 128, True, "narrow"),
    ((9, 0), torch.bfloat16, 136, True, "efficient"), ((9, 0), torch.bfloat16, 64, False, "efficient"),
    ((7, 5), torch.float16, 64, True, "efficient"), ((9, 0), torch.float32, 12, True, "efficient"),
])
def test_within_documents_it_is_our_kernel_or_one_that_takes_a_bias(
    monkeypatch, capability, dtype, head_dim, triton, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "triton_available", lambda: triton)
    for deterministic in (False, True):
        assert choose_backend(torch.device("cuda"), dtype, head_dim, deterministic, doc_mask=True) == expected


def test_without_triton_narrow_heads_take_the_kernel_of_wide_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "triton_available", lambda: False)
    assert choose_backend(torch.device("cuda"), torch.bfloat16, 12) == "flash"


def test_a_broken_cudnn_leaves_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "cudnn_attention_runs", lambda device, dtype: False)
    assert choose_backend(torch.device("cuda"), torch.bfloat16, 64) == "flash"


def test_cudnn_is_tried_before_it_is_believed():
    # On the CPU cuDNN's attention cannot run, whatever torch says of its presence.
    assert not attention.cudnn_attention_runs(torch.device("cpu"), torch.bfloat16)


def test_other_devices():
    assert choose_backend(torch.device("cpu"), torch.float32) == "cpu"
    assert choose_backend(torch.device("mps"), torch.float32) == "math"
