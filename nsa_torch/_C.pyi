from typing import Any

def build_info() -> dict[str, Any]: ...
def missing_kernels(architectures: list[str], capability: tuple[int, int]) -> str: ...
def ops_with_kernels() -> list[str]: ...
def choose_kernel(
    op: str,
    *,
    device: str = ...,
    dtype: str = ...,
    num_heads: int = ...,
    num_kv_heads: int = ...,
    num_keys: int = ...,
    select_size: int = ...,
    num_selected: int = ...,
) -> tuple[str, str]: ...
