"""Native Sparse Attention as a layer (arXiv 2502.11089, section 3), made of the ops."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoints, ops
from .block_compression import BlockCompression
from .cache import NSACache, NSALayerCache
from .checks import check_at_least, check_bools, check_divides
from .convolution import CausalConv, convolve_heads
from .exporting import Tokens, lengthen
from .heads import NSAInputs, split_branches, split_heads
from .layer_checks import check_cache, check_cache_heads, check_gate_dtype, check_rope, take_tokens
from .norms import make_norms, norm_heads
from .packing import packed_block_ends, packed_positions
from .placement import compute_device, compute_dtype, heads_mesh
from .ranks import gather_tokens, own_tokens, spread_tokens
from .rope import Tables, check_tables, for_heads, rope_tables, rotate, take_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["BlockCompression", "NSAAttention", "NSAChoices"]


class NSAChoices(NamedTuple):
    """What a layer attends to: `NSAAttention.choices`. Packed tensors have (sum T) for (B, T)."""

    block_indices: Tensor  # (B, T, Hkv, n) int32: blocks that each query reads, ascending, -1 last
    gates: Tensor  # (B, T, Hq, 3): weights of the compressed, the selected and the window branch


class NSAAttention(nn.Module):
    """Causal self-attention by three branches, added with gates: compressed, selected, window.

    Args:
        hidden_size: channels of the input and the output.
        num_heads, num_kv_heads: Hq query heads share Hkv key/value heads; Hkv divides Hq.
        head_dim: Dk, default hidden_size // num_heads; even when all of it is rotated.
        v_head_dim: Dv, default Dk.
        block_size, block_stride: length l and stride d of compression blocks; d divides l.
        select_size: length l' of selection blocks; d divides l'.
        num_selected: n, selection blocks that each query reads, the forced ones included.
        num_initial, num_local: forced blocks: the first ones, and the last ones up to the query.
        window: w, keys that the window branch sees, the query's own included.
        compression: "mlp", "linear" or "mean", see BlockCompression.
        rope_theta: base of the rotary embedding; None: the layer has none of its own.
        rope_dim: channels of a head that rope_theta rotates, the first ones; even, default Dk.
        rope_interleaved: channels 2 c and 2 c + 1 of a head turn as a pair, instead of c and c + rope_dim / 2.
        bias: biases in q_proj, k_proj, v_proj and o_proj. gate_proj always has one.
        qkv_bias, o_bias: biases in q_proj, k_proj and v_proj, and in o_proj; default `bias`.
        qk_norm: RMSNorm over Dk of every head of q and of k, before compression and rotation, in float32 for 16-bit
            tensors; one weight for all query heads, one for the keys of all heads and branches. Or two modules
            (q_norm, k_norm), each from (..., Dk) to the same shape.
        shared_kv: the selected and the window branch read the same keys and values.
        kv_conv: taps of a causal convolution on projected keys and values, each channel by itself, before norm,
            compression and rotation; None or 0: none. See `nsa_torch.convolution.CausalConv`.
        gate_dtype: dtype that gate_proj starts in, and of the logits that it computes, under autocast too; default that
            of the layer. `half()` or `to(dtype)` convert it with the rest.
        scale: of the scores, default Dk ** -0.5.
        compression_hidden: width of the compression's mlp, default 2 D.
        per_head_compression: each KV head has its own compression weights.

    Parameters:
        q_proj: Linear(hidden -> Hq Dk).
        k_proj, v_proj: Linear(hidden -> Hkv 3 Dk or Dv): of each head the three branches, in the order compressed,
            selected, window. With shared_kv Linear(hidden -> Hkv 2 Dk or Dv): compressed, then shared.
        gate_proj: Linear(hidden -> Hq 3), with a bias; a sigmoid follows.
        o_proj: Linear(Hq Dv -> hidden).
        compress_k, compress_v: BlockCompression of the compressed branch's keys and values.
        q_norm, k_norm: RMSNorm(Dk) or the modules given, with qk_norm.
        k_conv, v_conv: CausalConv of the channels of k_proj and v_proj, with kv_conv.

    docs/layer.md says in which order all that is applied, and what a cache keeps.

    For tensor parallelism see `nsa_torch.distributed.tensor_parallel_plan`: a rank has the heads that its parts of the
    projections give. Checkpoints of version 0.1, whose rows of k_proj and v_proj are ordered (3, Hkv, D), are converted
    by load_state_dict where their metadata tells the version, as what `torch.save(model.state_dict())` wrote does. A
    dict without metadata, such as a safetensors file, is taken to be of this version: see
    `nsa_torch.convert_state_dict_0_1`.

    Raises:
        ValueError: a size or an option out of range; the message names it.
        TypeError: an option of another kind.
    """

    _version = checkpoints.VERSION

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        *,
        block_size: int = 32,
        block_stride: int = 16,
        select_size: int = 64,
        num_selected: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        window: int = 512,
        compression: str = "mlp",
        rope_theta: float | None = 10000.0,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        bias: bool = False,
        qkv_bias: bool | None = None,
        o_bias: bool | None = None,
        qk_norm: bool | tuple[nn.Module, nn.Module] = False,
        shared_kv: bool = False,
        kv_conv: int | None = None,
        gate_dtype: torch.dtype | None = None,
        scale: float | None = None,
        compression_hidden: int | None = None,
        per_head_compression: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_at_least(1, hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        if head_dim is None:
            check_divides("num_heads", num_heads, "hidden_size when head_dim is None", hidden_size)
            head_dim = hidden_size // num_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_at_least(1, head_dim=head_dim, v_head_dim=v_head_dim, window=window)
        check_at_least(1, block_stride=block_stride, select_size=select_size)
        check_divides("block_stride", block_stride, "select_size", select_size)
        check_at_least(0, num_initial=num_initial, num_local=num_local)
        check_at_least(max(1, num_initial + num_local), num_selected=num_selected)
        qkv_bias, o_bias = (bias if given is None else given for given in (qkv_bias, o_bias))
        check_bools(bias=bias, qkv_bias=qkv_bias, o_bias=o_bias)
        check_bools(rope_interleaved=rope_interleaved, shared_kv=shared_kv)
        kv_conv = 0 if kv_conv is None else kv_conv
        check_at_least(0, kv_conv=kv_conv)
        check_rope(rope_theta, rope_dim, head_dim)
        check_gate_dtype(gate_dtype)
        self.hidden_size = hidden_size
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.block_size, self.block_stride = block_size, block_stride
        self.select_size, self.num_selected = select_size, num_selected
        self.num_initial, self.num_local = num_initial, num_local
        self.window, self.rope_theta, self.scale = window, rope_theta, scale
        self.rope_dim, self.rope_interleaved = rope_dim, rope_interleaved
        self.shared_kv, self.kv_conv, self.gate_dtype = shared_kv, kv_conv, gate_dtype

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_rows = num_kv_heads * self.kv_branches
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_rows * head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_rows * v_head_dim, bias=qkv_bias, **factory)
        gate_factory = factory if gate_dtype is None else factory | {"dtype": gate_dtype}
        self.gate_proj = nn.Linear(hidden_size, num_heads * 3, bias=True, **gate_factory)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=o_bias, **factory)
        phi = factory | {
            "block_size": block_size,
            "block_stride": block_stride,
            "compression": compression,
            "hidden_size": compression_hidden,
            "num_heads": num_kv_heads if per_head_compression else None,
        }
        self.compress_k = BlockCompression(head_dim, **phi)
        self.compress_v = BlockCompression(v_head_dim, **phi)
        self.q_norm, self.k_norm = make_norms(qk_norm, head_dim, factory)
        convs = [CausalConv(kv_rows * dim, kv_conv, **factory) if kv_conv else None for dim in (head_dim, v_head_dim)]
        self.k_conv, self.v_conv = convs

    def reset_parameters(self) -> None:
        """Draw all parameters anew: as torch does a Linear's, and as BlockCompression and CausalConv do theirs.

        Norms are reset, too, those given as qk_norm if they have reset_parameters.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj)
        for module in (*projections, self.compress_k, self.compress_v, self.k_conv, self.v_conv):
            if module is not None:
                module.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if callable(reset := getattr(norm, "reset_parameters", None)):
                reset()

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Any other module's state is of version 1, too, such as that of a dense layer whose projections are taken over.
        of_0_1 = local_metadata.get("version") == 1 and f"{prefix}gate_proj.weight" in state_dict
        if of_0_1 and not self.shared_kv:
            checkpoints.convert_layer_0_1(state_dict, prefix, self.num_kv_heads)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def new_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        num_layers: int = 1,
        max_crop: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NSACache:
        """An empty NSACache for this layer, or for `num_layers` like it.

        Under tensor parallelism by `tensor_parallel_plan` it has this rank's heads.

        device: default where the layer computes: its weights', or where accelerate's hooks bring them.
        dtype: float16, bfloat16, float32 or float64; default autocast's where it is on, else that of the weights
            (of those that are not quantized).
        """
        device = compute_device(self) if device is None else torch.device(device)
        return NSACache(
            batch_size,
            max_length,
            num_kv_heads=self.num_kv_heads // self.ranks,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            num_layers=num_layers,
            block_size=self.block_size,
            block_stride=self.block_stride,
            window=self.window,
            shared_kv=self.shared_kv,
            kv_conv=self.kv_conv,
            max_crop=max_crop,
            dtype=compute_dtype(self, device) if dtype is None else dtype,
            device=device,
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Tables | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: NSACache | NSALayerCache | None = None,
    ) -> Tensor:
        """Attend from every token to itself and those before it.

        Args:
            hidden_states: (B, T, hidden_size); packed (sum T, hidden_size) or with a leading 1. Under
                tensor parallelism also a DTensor.
            position_embeddings: in place of rope_theta, (cos, sin), each (B, T, R), (1, T, R) or (T, R), packed
                (sum T, R) or with a leading 1. R is even and at most Dk; the first R channels of a head are rotated.
                Entry c of a row belongs to channel c: angles stand twice, in both halves as in Hugging Face's Llama,
                or side by side with rope_interleaved. Or one complex tensor (freqs_cis) of width R / 2, a number for
                each pair, whichever channels that is.
            cu_seqlens: (B + 1,) int32 on the same device: where each packed sequence starts and
                the last one ends. On a GPU tokens may follow the last one, to fill a batch of fixed
                size: whatever they hold, their rows of the result are zeros, they change no
                gradient, and a cache does not take them. On the CPU they are refused.
            max_seqlen: at least the longest packed sequence, default sum T.
            cache: continue its sequences, and append to them. With cu_seqlens, packed chunk b
                continues sequence b. Of a cache of several layers give `cache[i]`. Needs
                torch.no_grad() or inference_mode().

        Returns:
            The shape of hidden_states.

        Raises:
            ValueError: a shape that does not fit, more tokens than the cache can hold, or projections that
                were cut within a head.
            TypeError: cu_seqlens of another dtype or device.
            RuntimeError: a cache while gradients are recorded, or after a CUDA graph overflowed it; torch's
                context_parallel, which this has not.
        """
        hidden_states = gather_tokens(self, hidden_states)
        x, padding = take_tokens(self, hidden_states, cu_seqlens)
        layer = None if cache is None else check_cache(self, cache, hidden_states)
        lengthened = False
        if layer is not None:
            out = self._attend_cached(x, position_embeddings, cu_seqlens, max_seqlen, layer)
            if x.size(-2) == 0:
                return self.o_proj(out.flatten(-2)).view(hidden_states.shape)
        else:
            tokens = Tokens(x, position_embeddings, cu_seqlens, max_seqlen)
            inputs, packing = self._inputs(*lengthen(tokens, self.block_size + self.block_stride))
            options = self._block_options() | {"window": self.window, "scale": self.scale}
            options |= self._choice_options() | packing
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
            out = ops.nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **options)
            if lengthened := out.size(-3) != x.size(-2):
                out = out.narrow(-3, 0, x.size(-2))
        out = self.o_proj(out.reshape(*hidden_states.shape[:-1], out.size(-2) * out.size(-1)))
        zeros_stay = not lengthened and type(self.o_proj) is nn.Linear and self.o_proj.bias is None
        if padding is not None and not zeros_stay:
            out = out.masked_fill(own_tokens(self, padding), 0)
        if layer is not None:
            layer.finish()  # last, so that whatever fails above leaves the cache as it was
        return out

    @torch.no_grad()
    def choices(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: Tables | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> NSAChoices:
        """The blocks that every query reads and its gates, of this rank's heads; arguments as for `forward`."""
        x, padding = take_tokens(self, gather_tokens(self, hidden_states), cu_seqlens)
        inputs, packing = self._inputs(x, position_embeddings, cu_seqlens, max_seqlen)
        if cu_seqlens is None:
            packing["seqlen_k"] = x.size(1)
        options = self._block_options() | {"scale": self.scale} | packing
        q, k_cmp, v_cmp = inputs[:3]
        _, lse = ops.compressed_attention(q, k_cmp, v_cmp, **options)
        indices = ops.select_blocks(q, k_cmp, lse, **self._choice_options(), **options)
        gates = inputs.gates if padding is None else inputs.gates.masked_fill(padding.unsqueeze(-1), 0)
        return NSAChoices(indices, gates)

    @property
    def ranks(self) -> int:
        """Over how many ranks of tensor parallelism the heads are cut."""
        mesh = heads_mesh(self)
        return 1 if mesh is None else mesh.size()

    @property
    def kv_branches(self) -> int:
        """How many keys and values of a token each KV head has: of three branches, or of two with shared_kv."""
        return 2 if self.shared_kv else 3

    def _mesh(self, kv_heads: int) -> DeviceMesh | None:
        """The ranks of tensor parallelism that have the other heads, if this one has not all; or this one alone."""
        mesh = heads_mesh(self)
        return None if mesh is None or (kv_heads == self.num_kv_heads and mesh.size() > 1) else mesh

    def _block_options(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "block_stride": self.block_stride}

    def _choice_options(self) -> dict[str, Any]:
        names = ("select_size", "num_selected", "num_initial", "num_local")
        return {name: getattr(self, name) for name in names}

    def _given_tables(self, position_embeddings: Tables | Tensor | None, x: Tensor) -> Tables | None:
        if position_embeddings is None:
            return None
        return check_tables(position_embeddings, (*x.shape[:-1], self.head_dim), self.rope_interleaved)

    def _own_tables(self, positions: Tensor, dtype: torch.dtype) -> Tables | None:
        if self.rope_theta is None:
            return None
        dim = self.head_dim if self.rope_dim is None else self.rope_dim
        return rope_tables(positions, dim, self.rope_theta, dtype)

    def _rotate(self, heads: Tensor, tables: Tables | None) -> Tensor:
        return rotate(heads, tables, self.rope_interleaved)

    def _project(
        self,
        x: Tensor,
        tables: Tables | None,
        cu_seqlens: Tensor | None = None,
        cache: NSALayerCache | None = None,
    ) -> NSAInputs:
        """Tokens (..., hidden_size) to queries, keys, values and gates; k_cmp is not rotated.

        cu_seqlens: of packed tokens. cache: whose step has begun, where they continue its sequences.
        """
        given, x, tables = x, self._in_autocast_dtype(x), for_heads(tables)
        x = spread_tokens(self, x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        logits = self.gate_proj(x) if self.gate_dtype is None else self._logits_in_own_dtype(spread_tokens(self, given))
        projected = split_heads(q, k, v, logits, self)
        if cache is not None:
            check_cache_heads(projected, cache)
        mesh = self._mesh(projected.k.size(-3))
        if self.k_conv is not None and self.v_conv is not None:
            projected = convolve_heads(projected, (self.k_conv, self.v_conv), cu_seqlens, cache, mesh)
        q = norm_heads("q_norm", self.q_norm, projected.q, mesh)
        k = norm_heads("k_norm", self.k_norm, projected.k, mesh)
        inputs = split_branches(projected._replace(q=q, k=k))
        q, k_slc = self._rotate(inputs.q, tables), self._rotate(inputs.k_slc, tables)
        k_win = k_slc if self.shared_kv else self._rotate(inputs.k_win, tables)
        return inputs._replace(q=q, k_slc=k_slc, k_win=k_win)

    def _logits_in_own_dtype(self, x: Tensor) -> Tensor:
        """Of the gates, in the dtype of gate_proj's weights; autocast keeps out."""
        kind, weight = x.device.type, getattr(self.gate_proj, "weight", None)
        x = x.to(weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else self.gate_dtype)
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return self.gate_proj(x)
        with torch.autocast(kind, enabled=False):
            return self.gate_proj(x)

    def _in_autocast_dtype(self, x: Tensor) -> Tensor:
        """Cast once: autocast would for each of the four projections, and cast back and add each one's gradient."""
        kind = x.device.type
        if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
            return x
        return x.to(torch.get_autocast_dtype(kind))

    def _inputs(
        self,
        x: Tensor,
        position_embeddings: Tables | Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> tuple[NSAInputs, dict[str, Any]]:
        """The op's inputs for whole sequences, compressed blocks included, and its packing."""
        tokens, size, stride = x.size(-2), self.block_size, self.block_stride
        tables = self._given_tables(position_embeddings, x)
        if tables is None and self.rope_theta is not None:
            if cu_seqlens is None:
                positions = torch.arange(tokens, device=x.device)
            else:
                positions = packed_positions(cu_seqlens, tokens)
            tables = self._own_tables(positions, x.dtype)
        inputs = self._project(x, tables, cu_seqlens)
        mesh = self._mesh(inputs.k_cmp.size(-2))
        k_cmp = self.compress_k(inputs.k_cmp, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, mesh=mesh)
        v_cmp = self.compress_v(inputs.v_cmp, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, mesh=mesh)
        if tables is not None:
            rows = k_cmp.size(-3)
            if cu_seqlens is None:
                ends = torch.arange(rows, device=x.device) * stride + size - 1
            else:
                ends = packed_block_ends(cu_seqlens, tokens, rows, size, stride)
            k_cmp = self._rotate(k_cmp, for_heads(take_rows(tables, ends)))
        packing: dict[str, Any] = {}
        if cu_seqlens is not None:
            packing = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            packing |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        return inputs._replace(k_cmp=k_cmp, v_cmp=v_cmp), packing

    def _attend_cached(
        self,
        x: Tensor,
        position_embeddings: Tables | Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: NSALayerCache,
    ) -> Tensor:
        """Append tokens (B, T, hidden_size) or (N, hidden_size) and attend: (N, Hq, Dv)."""
        tables = self._given_tables(position_embeddings, x)
        if cu_seqlens is None:
            batch, max_seqlen = x.shape[:2]
            if batch != (expected := cache.sequences.geometry.batch_size):
                raise ValueError(f"hidden_states must have the cache's batch {expected}, got {batch}")
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * max_seqlen
            x = x.flatten(0, 1)
            if tables is not None:
                cos, sin = (table.expand(batch, -1, -1).flatten(0, 1) for table in tables)
                tables = cos, sin
        if x.size(0) == 0:
            return torch.zeros(0, self.num_heads // self.ranks, self.v_head_dim, dtype=x.dtype, device=x.device)
        step = cache.begin(cu_seqlens, x.size(0), x.size(0) if max_seqlen is None else max_seqlen)
        if tables is None:
            tables = self._own_tables(step.positions, x.dtype)
        inputs = self._project(x, tables, cu_seqlens, cache)

        raw: dict[str, Any] = {"cu_seqlens": step.raw.cu_seqlens, "max_seqlen": step.raw.max_seqlen}
        raw["mesh"] = self._mesh(inputs.k_cmp.size(-2))
        k_raw, v_raw = cache.extend_raw(step, inputs.k_cmp, inputs.v_cmp)
        k_cmp = self.compress_k(k_raw.to(inputs.q.dtype), **raw)
        k_cmp = self._rotate(k_cmp, for_heads(take_rows(tables, step.block_ends)))
        cache.store_blocks(step, k_cmp, self.compress_v(v_raw.to(inputs.q.dtype), **raw))
        cache.store_tokens(step, inputs.k_slc, inputs.v_slc)
        window_slots = cache.extend_window(step, inputs.k_win, inputs.v_win)
        options = self._choice_options()
        return cache.attend(step, inputs.q, inputs.gates, window_slots, scale=self.scale, **options)

    def extra_repr(self) -> str:
        heads = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
        blocks = ("block_size", "block_stride", *self._choice_options(), "window", "rope_theta")
        # The others show in the modules that they add.
        options = ("rope_dim", "rope_interleaved", "shared_kv", "kv_conv", "gate_dtype")
        given = (name for name in options if getattr(self, name))
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*heads, *blocks, *given))
