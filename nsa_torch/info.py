"""What the library was built with, and which kernel runs for given shapes."""

from typing import Any


def build_info() -> dict[str, Any]:
    """What libnsa_torch.so was built with.

    Returns:
        ``torch`` (version), ``cuda`` (toolkit version, None when built without), ``compiler``, ``openmp`` (bool:
        whether the CPU kernels run in parallel), ``architectures`` (compute capabilities that
        CUDA kernels were compiled for, such as ``["8.0+PTX", "9.0a"]``), ``kernels`` (sets of kernels: ``"cpu"``,
        ``"sm80"``, the portable ones, ``"sm90a"``, those for Hopper).
    """
    from nsa_torch import _C

    return _C.build_info()


def which_kernel(
    op: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    num_heads: int = 1,
    num_kv_heads: int = 1,
    num_keys: int = 1,
    select_size: int = 64,
    num_selected: int = 16,
) -> tuple[str, str]:
    """Which kernel an op runs for given shapes, and why.

    Args:
        op: a function of this package, such as ``"selected_attention"``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``.
        num_heads, num_kv_heads: query heads, and key/value heads, which divide them.
        num_keys: uncompressed keys of a sequence.
        select_size, num_selected: selection block length and blocks per query.

    Returns:
        The kernel's name, and the reason in words.

    Raises:
        ValueError: an argument is out of range; the message names it and what is allowed.
    """
    from nsa_torch import _C

    return _C.choose_kernel(
        op,
        device=device,
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_keys=num_keys,
        select_size=select_size,
        num_selected=num_selected,
    )
