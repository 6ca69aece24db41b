"""Expertile's GPU steps from Python: a step is prepared, bound to tensors, and launched on the current stream."""

import ctypes
import os

import torch

_lib = ctypes.CDLL(os.environ.get("EXPERTILE_LIB", os.path.join(os.path.dirname(__file__), "libexpertile_vllm_gpu.so")))
_word = ctypes.c_uint64
_size = ctypes.c_size_t
_lib.expertile_error.restype = ctypes.c_char_p
_lib.expertile_permutation.restype = _size
_lib.expertile_permutation.argtypes = [_size] * 6 + [ctypes.c_bool, ctypes.c_bool, _size]
_lib.expertile_permutation_sizes.argtypes = [_size, _size, ctypes.POINTER(_size)]
_lib.expertile_layout_offsets.argtypes = [_size, ctypes.POINTER(_word)]
_lib.expertile_bind_permutation.restype = _size
_lib.expertile_bind_permutation.argtypes = [_size, _word, _word, _size, _word, _size, _word, _word, _word, _word]
_lib.expertile_bind_activation.restype = _size
_lib.expertile_bind_activation.argtypes = [_size, _word, _word, _word, _word, _size, _size, _size]
_lib.expertile_bind_unpermute.restype = _size
_lib.expertile_bind_unpermute.argtypes = [_size] * 4 + [_word] * 4
_lib.expertile_bind_gemm.restype = _size
_lib.expertile_bind_gemm.argtypes = [_size] * 8 + [_word] * 9 + [_size]
_lib.expertile_layer.restype = _size
_lib.expertile_layer.argtypes = [_size] * 6 + [_word] * 4
_lib.expertile_layer_choice.argtypes = [_size, _size, ctypes.POINTER(_size)]
_lib.expertile_bind_layer.restype = _size
_lib.expertile_bind_layer.argtypes = [_size, _size] + [_word] * 6
if hasattr(_lib, "expertile_mxfp4_weights"):
    # A build of before these weights has no such functions.
    _lib.expertile_mxfp4_weights.restype = _size
    _lib.expertile_mxfp4_weights.argtypes = [_size] * 3 + [_word, _word, ctypes.c_bool]
    _lib.expertile_mxfp4_bytes.restype = _size
    _lib.expertile_mxfp4_bytes.argtypes = [_size]
    _lib.expertile_bind_mxfp4_gemm.restype = _size
    _lib.expertile_bind_mxfp4_gemm.argtypes = [_size] * 3 + [_word] * 6 + [_size]
    _lib.expertile_mxfp4_layer.restype = _size
    _lib.expertile_mxfp4_layer.argtypes = [_size] * 5
if hasattr(_lib, "expertile_mxfp4_copy"):
    _lib.expertile_mxfp4_copy.argtypes = [_size, ctypes.POINTER(_word)]
if hasattr(_lib, "expertile_mxfp4_layer_with"):
    _lib.expertile_mxfp4_layer_with.restype = _size
    _lib.expertile_mxfp4_layer_with.argtypes = [_size] * 5 + [_word] * 2 + [ctypes.c_float] * 3
_lib.expertile_launch.argtypes = [_size, _word]
_lib.expertile_check.argtypes = [_size, _word]

LISTS = ("expert_num_tokens", "expert_start", "psum", "m_indices", "row_tokens", "inv_perm", "header", "worklist")


def _checked(value):
    if not value:
        raise RuntimeError(_lib.expertile_error().decode())
    return value


class Bound:
    """A step bound to tensors; call it to queue it on the current stream."""

    def __init__(self, handle, keep):
        self._handle = _checked(handle)
        self._keep = keep

    def __call__(self):
        _checked(_lib.expertile_launch(self._handle, torch._C._cuda_getCurrentRawStream(0)))

    def check(self):
        _checked(_lib.expertile_check(self._handle, torch._C._cuda_getCurrentRawStream(0)))


class Permutation:
    """Quantize + permute for one shape."""

    def __init__(
        self,
        tokens,
        topk,
        experts,
        hidden,
        alignment=128,
        reference_size=True,
        wide_ids=False,
        single_launch_slots=8192,
        row_tile=None,
    ):
        self._handle = _checked(
            _lib.expertile_permutation(
                tokens,
                topk,
                experts,
                hidden,
                alignment,
                row_tile or alignment,
                reference_size,
                wide_ids,
                single_launch_slots,
            )
        )
        self.alignment = alignment
        self.experts, self.hidden, self.tokens, self.topk = experts, hidden, tokens, topk
        sizes = (_size * 4)()
        _checked(_lib.expertile_permutation_sizes(self._handle, hidden, sizes))
        self.m_sum, self.scale_words, self.layout_bytes, self.workspace_bytes = sizes
        self._offsets = (_word * 8)()
        _checked(_lib.expertile_layout_offsets(self._handle, self._offsets))

    def bind(self, x, ids, expert_map=None):
        """-> a Bound with its output tensors as attributes, poisoned."""
        empty = lambda n, dtype: torch.empty(max(n, 16), device="cuda", dtype=dtype)
        out = empty(self.m_sum * self.hidden, torch.uint8).fill_(0xA5)
        scales = empty(self.scale_words, torch.float32).fill_(float("nan"))
        layout = empty(self.layout_bytes, torch.uint8).fill_(0xA5)
        workspace = empty(self.workspace_bytes, torch.uint8)
        bound = Bound(
            _lib.expertile_bind_permutation(
                self._handle,
                ids.data_ptr(),
                0 if expert_map is None else expert_map.data_ptr(),
                self.experts if expert_map is None else expert_map.numel(),
                x.data_ptr(),
                self.hidden,
                out.data_ptr(),
                scales.data_ptr(),
                layout.data_ptr(),
                workspace.data_ptr(),
            ),
            (x, ids, expert_map, out, scales, layout, workspace),
        )
        torch.cuda.synchronize()
        bound.rows = out[: self.m_sum * self.hidden].view(self.m_sum, self.hidden).view(torch.float8_e4m3fn)
        stride = -(-self.m_sum // 4) * 4
        bound.scales = scales[: self.scale_words].view(self.hidden // 128, stride).t()[: self.m_sum]
        of_worklist = (self.layout_bytes - self._offsets[7]) // 4
        lengths = dict(
            zip(
                LISTS,
                (
                    self.experts,
                    self.experts,
                    self.experts,
                    self.m_sum,
                    self.m_sum,
                    self.tokens * self.topk,
                    4,
                    of_worklist,
                ),
                strict=True,
            )
        )
        for name, offset in zip(LISTS, self._offsets, strict=True):
            setattr(bound, name, layout[offset : offset + 4 * lengths[name]].view(torch.int32))
        return bound


def bind_activation(mid, psum, alignment):
    """mid [M_sum, 2 I] bf16 -> a Bound with e4m3 `rows` [M_sum, I] and MN-major `scales`."""
    m_sum, intermediate = mid.shape[0], mid.shape[1] // 2
    rows = torch.empty((m_sum, intermediate), device="cuda", dtype=torch.uint8).fill_(0xA5)
    stride = -(-m_sum // 4) * 4
    scales = torch.empty((intermediate // 128, stride), device="cuda", dtype=torch.float32).fill_(float("nan"))
    bound = Bound(
        _lib.expertile_bind_activation(
            intermediate,
            mid.data_ptr(),
            psum.data_ptr(),
            rows.data_ptr(),
            scales.data_ptr(),
            psum.numel(),
            alignment,
            m_sum,
        ),
        (mid, psum, rows, scales),
    )
    bound.rows, bound.scales = rows.view(torch.float8_e4m3fn), scales.t()[:m_sum]
    return bound


def bind_unpermute(rows, inv_perm, weights, out):
    """rows [M_sum, H] bf16, inv_perm [M, topk] i32, weights [M, topk] f32, out [M, H] bf16."""
    (tokens, topk), (m_sum, hidden) = weights.shape, rows.shape
    return Bound(
        _lib.expertile_bind_unpermute(
            hidden, topk, tokens, m_sum, rows.data_ptr(), inv_perm.data_ptr(), weights.data_ptr(), out.data_ptr()
        ),
        (rows, inv_perm, weights, out),
    )


class Mxfp4:
    """MXFP4 weights [E, N, K] as the GEMM reads them, for e4m3 or bf16 rows, of blocks [E, N, K / 2] and scales
    [E, N, K / 32]. A layer's memory is never given back, nor is theirs."""

    def __init__(self, blocks, scales, bf16_rows=False, e4m3_copy=False):
        experts, n, half = blocks.shape
        self.shape = (experts, n, 2 * half)
        torch.cuda.synchronize()
        self.handle = _checked(
            _lib.expertile_mxfp4_weights(*self.shape, blocks.data_ptr(), scales.data_ptr(), bf16_rows)
        )
        addresses = (_word * 2)()
        if e4m3_copy:
            _checked(_lib.expertile_mxfp4_copy(self.handle, addresses))
        self.copy = tuple(addresses) if e4m3_copy else None
        self.bytes = _lib.expertile_mxfp4_bytes(self.handle)


def bind_gemm(tile, weights, rows, scales, layout, out, out_scales=None, from_copy=False):
    """weights = (e4m3 [E, N, K], f32 [E, N / 128, K / 128]), or Mxfp4, of which `from_copy` multiplies by the copy in
    e4m3; `layout` is a bound permutation whose worklist has the tile's rows. With `out_scales` the activation is in it:
    `out` is then e4m3 [M_sum, N / 2]."""
    if isinstance(weights, Mxfp4) and not from_copy:
        row_tile, _, _, _, outputs = tile
        tensors = (rows, scales, out, layout.header, layout.worklist, layout.psum)
        addresses = (tensor.data_ptr() for tensor in tensors)
        return Bound(
            _lib.expertile_bind_mxfp4_gemm(row_tile, outputs, weights.handle, *addresses, rows.shape[0]),
            (weights, rows, scales, layout, out),
        )
    if isinstance(weights, Mxfp4):
        sizes, addresses = weights.shape, weights.copy
    else:
        sizes, addresses = weights[0].shape, [part.data_ptr() for part in weights]
    return Bound(
        _lib.expertile_bind_gemm(
            *tile,
            *sizes,
            *addresses,
            rows.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            0 if out_scales is None else out_scales.data_ptr(),
            layout.header.data_ptr(),
            layout.worklist.data_ptr(),
            layout.psum.data_ptr(),
            rows.shape[0],
        ),
        (weights, rows, scales, layout, out, out_scales),
    )


class Layer:
    """The whole layer; w13 and w2 are as for `bind_gemm`, or pairs of bf16 weights and None. Only Mxfp4 ones go with
    biases, f32 [E, 2 I] and [E, H], and with SwiGLU's alpha, beta and limit (0: none)."""

    def __init__(self, w13, w2, topk, global_experts, max_tokens, biases=None, swiglu=(1.0, 0.0, 0.0)):
        self._keep = (w13, w2)
        if biases is not None:
            host = [bias.float().cpu().contiguous() for bias in biases]
            addresses = (w13.handle, w2.handle, *(bias.data_ptr() for bias in host))
            self._handle = _checked(
                _lib.expertile_mxfp4_layer_with(topk, global_experts, max_tokens, *addresses, *swiglu)
            )
            return
        if isinstance(w13, Mxfp4):
            handles = (w13.handle, w2.handle)
            self._handle = _checked(_lib.expertile_mxfp4_layer(topk, global_experts, max_tokens, *handles))
            return
        experts, hidden, intermediate = w2[0].shape
        self._handle = _checked(
            _lib.expertile_layer(
                hidden,
                intermediate,
                experts,
                topk,
                global_experts,
                max_tokens,
                *(0 if part is None else part.data_ptr() for part in (*w13, *w2)),
            )
        )

    def choice(self, tokens):
        """-> workspace bytes, alignment, launches, whether GEMM 1 has the activation inside, the tile of each GEMM: row
        tile, blocks that share rows, parts of K, 1 for the wide kernel, outputs; whether each reads the e4m3 copy."""
        found = (_size * 16)()
        _checked(_lib.expertile_layer_choice(self._handle, tokens, found))
        return *found[:3], bool(found[3]), tuple(found[4:9]), tuple(found[9:14]), [bool(copy) for copy in found[14:]]

    def bind(self, x, ids, weights, out, workspace, expert_map=None):
        addresses = [0 if t is None else t.data_ptr() for t in (x, ids, expert_map, weights, out, workspace)]
        bound = Bound(
            _lib.expertile_bind_layer(self._handle, x.shape[0], *addresses),
            (self, x, ids, expert_map, weights, out, workspace),
        )
        torch.cuda.synchronize()
        return bound
