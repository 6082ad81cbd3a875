"""For what runs kernels under Triton's interpreter, in a process of its own."""

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend_interpreter():
    """Two faults of Triton's interpreter that no GPU has.

    It cuts fp32 off to bf16, which doubles every error; and up to Triton 3.6 its loops fail with NumPy 2.4.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *rest):
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_and_index

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast
