"""Makes Triton's CPU interpreter compute bfloat16, so that bf16 kernels can be judged without a GPU.

The interpreter keeps a bf16 value as its 16-bit pattern in a uint16 array. Up to triton 3.9 several
operations work on that pattern as if it were a number: `tl.dot` multiplies patterns (results near
1e9), +, -, *, comparisons and tl.sum do the same, and a cast from fp32 cuts the low bits off where
hardware rounds to nearest even. All silently. Not mended: atomics on bf16.
"""

import os

PATCHED = {
    "InterpreterBuilder": ("binary_op", "unary_op", "create_fma", "create_clampf", "create_dot"),
    "ReduceOps": ("sum",),
    "ScanOps": ("cumsum", "cumprod"),
}


def install() -> None:
    """Mends bf16 in this process's interpreter; changes nothing where bf16 is right, as on a second call.

    Raises ValueError unless TRITON_INTERPRET=1 was set before triton was first imported, and
    RuntimeError, naming the triton version, where the interpreter is no longer built as expected.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("TRITON_INTERPRET: set it to 1 before triton is imported; the interpreter is off")
    import triton
    import triton.language as tl

    try:
        from triton.runtime import interpreter

        interpreted = isinstance(tl.sum, interpreter.InterpretedFunction)
        if interpreted and not bf16_is_right(interpreter, tl):
            mend(interpreter, tl)
            if not bf16_is_right(interpreter, tl):
                raise RuntimeError("bf16 is still wrong after the patch")
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        version = triton.__version__
        raise RuntimeError(f"triton {version}: cannot mend its interpreter for bf16: {error}") from error
    if not interpreted:
        raise ValueError("TRITON_INTERPRET was set after triton had been imported: set it before")


def mend(interpreter, tl) -> None:
    """Computes each patched operation in fp32 and rounds once, as hardware does."""
    import numpy as np
    import torch

    values = (interpreter.TensorHandle, tl.tensor)

    def retyped(x, dtype):
        return x.type.with_element_ty(dtype) if x.shape else dtype

    def widen(x):
        if isinstance(x, tl.tensor) and x.dtype == tl.bfloat16:
            return tl.tensor(widen(x.handle), retyped(x, tl.float32))
        if isinstance(x, interpreter.TensorHandle) and x.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return x

    def narrow(x):
        if isinstance(x, list):
            return [narrow(item) for item in x]
        if isinstance(x, tl.tensor):
            return tl.tensor(narrow(x.handle), retyped(x, tl.bfloat16))
        if x.data.dtype == bool:  # a comparison
            return x
        rounded = torch.from_numpy(np.array(x.data, dtype=np.float32, order="C")).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def in_fp32(original):
        def patched(self, *args):
            # The last operand names the result's type: in a dot it is the accumulator.
            last = [x for x in args if isinstance(x, values)][-1]
            result = original(self, *(widen(x) for x in args))
            return narrow(result) if last.dtype.scalar == tl.bfloat16 else result

        return patched

    for cls, names in PATCHED.items():
        for name in names:
            owner = getattr(interpreter, cls)
            setattr(owner, name, in_fp32(getattr(owner, name)))

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        src = widen(src)
        return narrow(src) if dst_type.scalar == tl.bfloat16 else cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def bf16_is_right(interpreter, tl) -> bool:
    """Rounds, multiplies, adds and sums a few numbers in bf16; judged by result, not by version."""
    import numpy as np

    builder = interpreter.interpreter_builder

    def bf16(*bits: int):
        return interpreter.TensorHandle(np.array([bits], dtype=np.uint16), tl.bfloat16)

    def fp32(*numbers: float):
        return interpreter.TensorHandle(np.array([numbers], dtype=np.float32), tl.float32)

    ties, zero = fp32(1 + 2**-8, 1 + 3 * 2**-8, -np.inf), fp32(0.0)
    three, minus_two = bf16(0x4040), bf16(0xC000)
    pair = tl.tensor(bf16(0x4040, 0xC000), tl.block_type(tl.bfloat16, [1, 2]))
    total = interpreter.ReduceOps(1, None, False).sum(pair)
    return (
        builder.create_fp_trunc(ties, tl.bfloat16).data.tolist() == [[0x3F80, 0x3F82, 0xFF80]]
        and builder.create_dot(three, minus_two, zero, None, 0).data.item() == -6
        and builder.create_fadd(three, minus_two).data.item() == 0x3F80
        and builder.create_fcmpOGT(three, minus_two).data.item() is True
        and total.handle.data.item() == 0x3F80
    )
