from typing import Any

class KernelQuery:
    op: str
    device: str
    dtype: str
    backward: bool
    capability: tuple[int, int]
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    num_queries: int
    num_keys: int
    block_size: int
    block_stride: int
    select_size: int
    num_selected: int
    window: int

class KernelReport:
    @property
    def kernels(self) -> list[str]: ...
    @property
    def reason(self) -> str: ...
    @property
    def splits(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...

def build_info() -> dict[str, Any]: ...
def missing_kernels(architectures: list[str], capability: tuple[int, int]) -> str: ...
def ops_with_kernels() -> list[str]: ...
def which_kernel(query: KernelQuery) -> KernelReport: ...
