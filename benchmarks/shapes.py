"""The one list of shapes that drives the tests and the benchmarks, with what each op must compute and move.

`ADVERSARIAL` and `TILED` are for the tests, `CPU`, `GPU`, `MODELS` and `DECODE` for the benchmarks. `cost(op, shape)`
counts the floating-point operations and the bytes that an op cannot do without, so that every measured time has its
share of the machine's limit beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One problem: sizes of the tensors and the options of the method, named as in nsa_torch."""

    name: str
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    dim_k: int
    dim_v: int
    batch: int = 1
    block_size: int = 32
    block_stride: int = 16
    select_size: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512

    @property
    def group(self) -> int:
        """G: query heads that share a KV head."""
        return self.heads_q // self.heads_kv

    @property
    def blocks(self) -> int:
        """M: compression blocks of the keys."""
        return visible_blocks(self, self.seqlen_k - 1)

    @property
    def selection_blocks(self) -> int:
        """J: selection blocks of the keys, the last one perhaps incomplete."""
        return -(-self.seqlen_k // self.select_size)

    def options(self, *names: str) -> dict[str, Any]:
        """The named options as keyword arguments."""
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return self.name


# The tests' small sizes: every boundary of the defaults (l < l' < w, l / d = 2, l' / d = 4) at a quarter of the length.
def _small(name: str, seqlen_q: int, seqlen_k: int, *heads_and_dims: int, **changes: Any) -> Shape:
    heads_q, heads_kv, dim_k, dim_v = heads_and_dims or (4, 2, 6, 4)
    options = {"block_size": 8, "block_stride": 4, "select_size": 16, "num_selected": 4, "window": 13}
    return Shape(name, seqlen_q, seqlen_k, heads_q, heads_kv, dim_k, dim_v, **(options | changes))


ADVERSARIAL = (
    _small("empty", 0, 0),
    _small("empty_batch", 9, 9, batch=0),
    _small("no_queries", 0, 19),
    _small("one_token", 1, 1),
    _small("l_minus_1", 7, 7, batch=2),
    _small("l", 8, 8),
    _small("l_plus_1", 9, 9),
    _small("select_minus_1", 15, 15),
    _small("select", 16, 16),
    _small("select_plus_1", 17, 17),
    _small("window_plus_1", 14, 14, num_local=1),
    _small("prime_31_batch_3", 31, 31, batch=3),
    _small("prime_67", 67, 67),
    _small("chunk_of_a_prime", 29, 67, batch=2),
    _small("chunk_ends_in_a_block", 5, 64),
    _small("decode", 1, 67, batch=2),
    _small("decode_short", 1, 7),
    _small("group_1", 37, 37, 2, 2, 5, 7),
    _small("group_3", 37, 37, 6, 2, 4, 3),
    _small("group_4_wide_values", 33, 41, 8, 2, 8, 16),
    _small("group_6", 23, 37, 6, 1, 3, 5),
    _small("group_16", 21, 37, 16, 1, 8, 8),
    _small("one_channel", 19, 19, 2, 1, 1, 1),
    _small("stride_is_block", 50, 50, block_stride=8),
    _small("stride_1", 26, 26, block_size=3, block_stride=1, select_size=5, num_selected=5),
    _small("overlap_4", 61, 61, block_stride=2, num_initial=2),
    _small("select_below_block", 43, 43, select_size=4, num_selected=7, num_local=3),
    _small("select_is_stride", 43, 43, block_stride=4, select_size=4, num_selected=5),
    _small("nothing_forced", 53, 53, num_initial=0, num_local=0, num_selected=2),
    _small("all_forced", 53, 53, num_initial=2, num_local=2, num_selected=4),
    _small("more_than_there_are", 37, 37, num_selected=50),
    _small("one_selected", 53, 53, num_initial=0, num_local=1, num_selected=1),
    _small("window_1", 29, 29, window=1),
    _small("window_is_all", 29, 29, window=1000),
)

# Long enough to cross every tile and chunk of the kernels, and to be cut in the middle of one.
TILED = (
    Shape("paper_options_781", 781, 781, 4, 1, 16, 24, window=200),
    Shape("paper_options_chunk", 307, 1031, 6, 2, 32, 16, num_selected=6, window=130),
)

# Forward plus backward against dense attention on a CPU.
CPU = tuple(Shape(f"cpu_{t // 1024}k", t, t, 8, 2, 64, 64) for t in (1024, 2048, 4096, 8192, 16384, 32768))

# The paper's layer (64 query heads, 4 KV heads) at head dimension 128.
GPU = tuple(Shape(f"gpu_{1 << n}k", 1024 << n, 1024 << n, 64, 4, 128, 128) for n in range(8))

# One layer's attention in models that are in use: query heads, KV heads, head dimension.
HEADS_OF_MODELS = {
    "Llama 3 8B": (32, 8, 128),
    "Llama 3.2 1B": (32, 8, 64),
    "Qwen3 32B": (64, 8, 128),
    "the paper": (64, 4, 128),
}
# The same number of tokens as one sequence or as several, and one that is four times as long.
MODELS = tuple(
    Shape(f"{model}, {batch} x {t // 1024}k", t, t, heads, kv_heads, dim, dim, batch=batch)
    for model, (heads, kv_heads, dim) in HEADS_OF_MODELS.items()
    for batch, t in ((1, 8192), (1, 32768), (8, 4096), (4, 8192))
)

DECODE = tuple(
    Shape(f"decode_{t // 1024}k_batch_{batch}", 1, t, 64, 4, 128, 128, batch=batch)
    for t, batch in ((65536, 1), (65536, 8), (32768, 32))
)


def visible_blocks(shape: Shape, position: int) -> int:
    """Compression blocks that the query at `position` sees: those with m d + l - 1 <= p."""
    return max(0, (position - shape.block_size + 1) // shape.block_stride + 1)


@dataclass(frozen=True)
class Cost:
    """What an op must do at least: operations (a multiply-add is two) and bytes to and from memory.

    Every tensor is moved once; keys that no query reads are not counted.
    """

    forward_flops: int
    forward_bytes: int
    backward_flops: int = 0
    backward_bytes: int = 0


def cost(op: str, shape: Shape, itemsize: int = 2) -> Cost:
    """Cost of one call of `op`, one of `OPS`, on elements of `itemsize` bytes (lse has 4, block_indices 4)."""
    return OPS[op](shape, itemsize)


def visible_pairs(op: str, shape: Shape) -> int:
    """(query, key) pairs of one query head in one batch entry that the branch of `op` scores."""
    count = {
        "compressed_attention": lambda p: visible_blocks(shape, p),
        "select_blocks": lambda p: visible_blocks(shape, p),
        "selected_attention": lambda p: _selected_keys(shape, p),
        "window_attention": lambda p: min(p + 1, shape.window),
        "dense_attention": lambda p: p + 1,
    }[op]
    return sum(count(p) for p in range(shape.seqlen_k - shape.seqlen_q, shape.seqlen_k))


def _selected_keys(shape: Shape, position: int) -> int:
    """A full list that holds the query's own block, which is read up to the query."""
    own, offset = divmod(position, shape.select_size)
    return min(shape.num_selected - 1, own) * shape.select_size + offset + 1


def _keys_read(op: str, shape: Shape) -> int:
    """Keys of one KV head that the queries read together: the union of what each one sees, at most."""
    return {
        "compressed_attention": shape.blocks,
        "select_blocks": shape.blocks,
        "selected_attention": min(shape.seqlen_k, shape.seqlen_q * shape.num_selected * shape.select_size),
        "window_attention": min(shape.seqlen_k, shape.window + max(shape.seqlen_q - 1, 0)),
        "dense_attention": shape.seqlen_k,
    }[op]


def _rows(shape: Shape) -> int:
    return shape.batch * shape.seqlen_q * shape.heads_q


def _attention_cost(op: str) -> Callable[[Shape, int], Cost]:
    """Forward q k^T and p v; backward these scores again, dp = do v^T, dv = p^T do, dq = ds k, dk = ds^T q."""

    def branch(shape: Shape, itemsize: int) -> Cost:
        pairs = shape.batch * shape.heads_q * visible_pairs(op, shape)
        keys = shape.batch * shape.heads_kv * _keys_read(op, shape) * (shape.dim_k + shape.dim_v) * itemsize
        q, out, lse = _rows(shape) * shape.dim_k * itemsize, _rows(shape) * shape.dim_v * itemsize, _rows(shape) * 4
        lists = _list_bytes(shape) if op == "selected_attention" else 0
        return Cost(
            forward_flops=2 * pairs * (shape.dim_k + shape.dim_v),
            forward_bytes=q + keys + lists + out + lse,
            backward_flops=2 * pairs * (3 * shape.dim_k + 2 * shape.dim_v),
            backward_bytes=2 * (q + keys) + lists + 2 * out + lse,
        )

    return branch


def _list_bytes(shape: Shape) -> int:
    return shape.batch * shape.seqlen_q * shape.heads_kv * shape.num_selected * 4


def _select_cost(shape: Shape, itemsize: int) -> Cost:
    """The scores once more; the softmax, the sums and the choice are not matrix products and not counted."""
    pairs = shape.batch * shape.heads_q * visible_pairs("select_blocks", shape)
    keys = shape.batch * shape.heads_kv * shape.blocks * shape.dim_k * itemsize
    q_and_lse = _rows(shape) * (shape.dim_k * itemsize + 4)
    return Cost(2 * pairs * shape.dim_k, q_and_lse + keys + _list_bytes(shape))


def _compress_cost(shape: Shape, itemsize: int) -> Cost:
    """The mlp on keys, hidden and output as wide as a head; backward has one product for x and one for each weight."""
    dim = shape.dim_k
    tokens = shape.batch * shape.heads_kv * shape.blocks
    flops = 2 * tokens * (shape.block_size * dim * dim + dim * dim)
    weights = (shape.block_size * dim * (dim + 1) + dim * dim + 2 * dim) * itemsize
    x, out = shape.batch * shape.heads_kv * shape.seqlen_k * dim * itemsize, tokens * dim * itemsize
    return Cost(flops, x + weights + out, 2 * flops, 2 * (x + weights) + out)


def _nsa_cost(shape: Shape, itemsize: int) -> Cost:
    """All branches and the choice; q, out and their gradients are moved once for all of them."""
    branches = ("compressed_attention", "selected_attention", "window_attention")
    costs = [cost(branch, shape, itemsize) for branch in branches]
    gate_flops = 6 * _rows(shape) * shape.dim_v
    gates = 3 * _rows(shape) * itemsize
    q, out = _rows(shape) * shape.dim_k * itemsize, _rows(shape) * shape.dim_v * itemsize
    return Cost(
        forward_flops=sum(c.forward_flops for c in costs) + _select_cost(shape, itemsize).forward_flops + gate_flops,
        forward_bytes=sum(c.forward_bytes for c in costs) - 2 * (q + out) + _list_bytes(shape) + gates,
        backward_flops=sum(c.backward_flops for c in costs) + 2 * gate_flops,
        # Each branch has its own out; q, its gradient and the gradient of out are shared.
        backward_bytes=sum(c.backward_bytes for c in costs) - 2 * (2 * q + out) + 2 * gates,
    )


OPS: dict[str, Callable[[Shape, int], Cost]] = {
    "compress": _compress_cost,
    "compressed_attention": _attention_cost("compressed_attention"),
    "select_blocks": _select_cost,
    "selected_attention": _attention_cost("selected_attention"),
    "window_attention": _attention_cost("window_attention"),
    "dense_attention": _attention_cost("dense_attention"),
    "nsa_attention": _nsa_cost,
}
