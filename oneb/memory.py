"""Peak GPU memory of a training step, by part, from the configuration: a walk through the step that counts bytes.

The walk follows the code: what :mod:`oneb.model.fused` saves and makes, when autograd drops it, what the loss head
holds at once. Each moment's tensors are added up, and the peak is the largest sum. That is more work than one formula,
and right where the moments compete: a wide layer's backward, the head's logits, or the update at the end.

Legend: N tokens of a micro-batch, d = d_model, F = d_ff, W = widths of queries, keys and values together.
"""

from __future__ import annotations

from dataclasses import dataclass

from oneb.accounting import BYTES, HEAD_CHUNK_TOKENS, matmul_parameters, parameter_counts, qkv_widths
from oneb.config import DOCUMENT_HEAD_DIM, NARROW_HEAD_DIM, Config, ModelConfig, compute_dtype

PARTS = ("weights", "gradients", "optimizer", "activations", "loss head", "workspace", "allocator", "context")

# What only a GPU can tell, from 151 points on an H200 (bench/results/memory_h200.json), where the sum is 0 to 3% more
# than the process took.
CONTEXT_BYTES = 770 * 2**20  # the CUDA context and the modules it has loaded, outside of torch's allocator
# cuBLAS's workspaces, which torch's allocator hands out: 32 MiB on Hopper for each thread that multiplies, the main one
# and autograd's. Measured: the peaks in bench/results/step_h200.json are that much above the tensors.
WORKSPACE_BYTES = 64 * 2**20
# What the allocator holds beside the tensors: rounding, and pieces that no tensor fits into. The least, and a share of
# what comes and goes within a step.
ALLOCATOR_BYTES = 256 * 2**20
ALLOCATOR_SHARE = 0.02

# Bytes of optimizer state an entry of a matrix: fp32 moments, or codes of 8 bits and a fp32 scale for 256 of them.
STATE_BYTES = {"lion": 4.0, "adamw": 8.0, "lion8bit": 1 + 4 / 256, "adamw8bit": 2 * (1 + 4 / 256)}
_MOMENTS = {"lion": 1, "adamw": 2, "lion8bit": 1, "adamw8bit": 2}
# The plain-torch update takes 2**24 entries at a time, about 64 bytes each (oneb.kernels.optimizer_step).
_UPDATE_CHUNK, _UPDATE_BYTES = 2**24, 64
_HEAD_MULTIPLE = 8  # torch's attention kernels want heads in multiples of it (oneb.kernels.attention)
# torch's kernel of the embedding's gradient: below, a simple one; above, it sorts, with fp32 partial sums of 10 rows.
_SORTED_FROM_TOKENS, _ROWS_A_PARTIAL_SUM = 3072, 10


def state_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of the optimizer's state. Vectors keep fp32 moments whatever its kind.

    Args:
        optimizer: "lion", "adamw", "lion8bit" or "adamw8bit".
    """
    matrices = matmul_parameters(model) + _padding_rows(model)
    vectors = _stored_parameters(model) - matrices
    return round(matrices * STATE_BYTES[optimizer]) + vectors * 4 * _MOMENTS[optimizer]


def step_memory(
    config: Config, seq_len: int, batch_size: int, recomputed_layers: int, *, optimizer: str,
) -> dict[str, int]:
    """Bytes by part (:data:`PARTS`) at the peak of a step; their sum is the process's peak, as nvidia-smi shows it.

    Args:
        config: settled (:func:`oneb.config.device_defaults`).
        seq_len: tokens a sequence.
        batch_size: sequences a micro-batch; where a step has several, later ones run beside the gradients so far.
        recomputed_layers: the first so many blocks keep only their input, and run again in the backward pass.
        optimizer: "lion", "adamw", "lion8bit" or "adamw8bit"; the configuration's is not looked at.
    """
    walk = _Walk(config, batch_size * seq_len, recomputed_layers, optimizer)
    if documents_by_bias(config):  # of each score: one for all layers, or with a null key each layer's own, aligned
        layers = config.model.n_layers if config.model.null_attn else 1
        walk.bias = batch_size * seq_len**2 * walk.sizes.value * layers
    walk.micro_batch(first=True)
    if config.train.sequences(seq_len) > batch_size:
        walk.micro_batch(first=False)
    assert walk.live["activations"] == walk.live["loss head"] == 0, walk.live
    walk.update()
    if config.train.precision == "fp8":
        # Before the first step one sequence runs in 16 bit, to find the scales.
        other = _Walk(config, seq_len, recomputed_layers, optimizer, calibrating=True)
        other.micro_batch(first=True)
        walk.worst = max(walk.worst, other.worst, key=lambda parts: sum(parts.values()))
    return {part: walk.worst.get(part, 0) for part in PARTS}


def documents_by_bias(config: Config) -> bool:
    """Whether ``--doc-mask`` goes by a bias for scores: in fp32, on cards without bf16, and for heads too wide."""
    widest = max(config.model.qk_head_dim, config.model.v_head_dim)
    return config.data.doc_mask and (compute_dtype(config.train) != "bf16" or widest > DOCUMENT_HEAD_DIM)


def activation_bytes_per_token(
    model: ModelConfig, value: int, operand: int, *, fused: bool, compiled: bool = False
) -> int:
    """What one block keeps a token for its backward pass, its input included.

    Args:
        value: bytes of an activation.
        operand: bytes of an entry that only a matrix product reads again; fused blocks may keep those in fp8.
        fused: whether the block runs by :mod:`oneb.model.fused`; else its backward is autograd's.
        compiled: whether torch.compile chooses what to keep. Then the figure is what it was seen to choose.
    """
    d, d_ff = model.d_model, model.d_ff
    heads_out, queries = model.n_heads * model.v_head_dim, model.n_heads * model.qk_head_dim
    qkv, own_q = sum(qkv_widths(model)), queries if model.tie_qk else 0
    if fused:
        # The residual stream twice, queries, keys and values, attention's output, gate and up.
        values = 2 * d + qkv + own_q + heads_out + 2 * d_ff
        # Both norms' outputs and SwiGLU's; in fp8 also a copy of attention's output.
        operands = 2 * d + d_ff + (heads_out if operand < value else 0)
        # fp32: attention's log-sum-exp, and the two norms' scales.
        return values * value + operands * operand + 4 * (model.n_heads + 2)
    keys = model.n_kv_heads * model.qk_head_dim
    if compiled:
        padded = model.n_heads * _padded_head(model)
        null = 2 * heads_out if model.null_attn and not _is_narrow(model) else 0  # around torch's attention
        return (4 * d + qkv + padded + null + heads_out + 3 * d_ff) * value + 4 * (model.n_heads + 2)
    # Autograd, operation by operation. A norm keeps its input widened and normalised, in fp32, beside its output.
    wide = 4 if value < 4 else 0
    norms = 2 * (d * (wide or value) + 4 * d + d * value)
    attention = (qkv + queries + keys + heads_out) * value + (queries * (wide or value) if model.learned_temp else 0)
    feed_forward = 4 * d_ff * value  # gate and up, silu(gate), act
    return norms + attention + feed_forward + 4 * (model.n_heads + 2)


def _padding_rows(model: ModelConfig) -> int:
    return (model.padded_vocab_size - model.vocab_size) * model.d_model


def _stored_parameters(model: ModelConfig) -> int:
    return sum(parameter_counts(model).values()) + _padding_rows(model)


def _padded_head(model: ModelConfig) -> int:
    return -(-max(model.qk_head_dim, model.v_head_dim) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def _is_narrow(model: ModelConfig) -> bool:
    return max(model.qk_head_dim, model.v_head_dim) <= NARROW_HEAD_DIM


def _attention_copies(model: ModelConfig, dtype: str) -> int:
    """Entries a token of what torch's attention keeps because it cannot take heads as they are; none for ours.

    Shared key/value heads are repeated, and heads padded, for kernels of cards without bf16 and for fp32.
    """
    if dtype == "bf16" and _is_narrow(model):
        return 0
    padded = _padded_head(model)
    kv_heads = model.n_kv_heads if dtype == "bf16" else model.n_heads
    pads = model.qk_head_dim != padded or model.v_head_dim != padded
    repeats = kv_heads != model.n_kv_heads
    return (2 * model.n_heads * padded if pads else 0) + (2 * kv_heads * padded if pads or repeats else 0)


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the walk through a step takes and gives: of one block, unless it says otherwise."""

    value: int  # bytes of an activation
    operand: int  # of an entry that only a product reads
    stored: int  # of a weight, and of its gradient
    kept: int  # saved for the backward pass, without the block's input
    stream: int  # (N, d): a block's input, output or their gradient
    casts: int  # 16-bit copies of wider weights
    cast_with_graph: bool  # whether these live as long as the autograd graph; else as long as the block's activations

    @classmethod
    def of(cls, config: Config, tokens: int, eight_bit: bool) -> _Sizes:
        model, train = config.model, config.train
        dtype = compute_dtype(train)
        value, stored, fused = BYTES[dtype], BYTES[train.param_dtype], bool(train.fused_blocks)
        operand = 1 if eight_bit else value
        d = model.d_model
        block = activation_bytes_per_token(model, value, operand, fused=fused, compiled=bool(train.compile))
        block += _attention_copies(model, dtype) * value
        matrices = d * (sum(qkv_widths(model)) + model.attn_dim + 3 * model.d_ff)
        casts = matrices * value if value < stored and not eight_bit else 0
        return cls(value, operand, stored, tokens * (block - d * value), tokens * d * value, casts, fused)


@dataclass(frozen=True)
class _Stage:
    """A part of a block's backward: bytes that it makes for its own use, matrices' entries, saved bytes it frees."""

    temporary: int
    matrices: int
    freed: int


class _Walk:
    """A step of training, told by the bytes that come and go; ``worst`` is their largest sum, by part."""

    def __init__(
        self, config: Config, tokens: int, recomputed_layers: int, optimizer: str, *, calibrating: bool = False
    ) -> None:
        self.config, self.model, self.tokens = config, config.model, tokens
        self.recomputed = recomputed_layers
        self.calibrating = calibrating
        self.bias = 0  # bytes of what keeps attention within documents
        fp8 = config.train.precision == "fp8"
        self.eight_bit = fp8 and not calibrating
        self.sizes = _Sizes.of(config, tokens, self.eight_bit)
        self.on_cuda = config.train.device in ("cuda", "auto")
        self.live = dict.fromkeys(PARTS, 0)
        self.worst = dict(self.live)
        # Each matrix of a block also exists twice in 8 bits: as it is, and transposed.
        copies = 2 * (matmul_parameters(self.model) - self.model.vocab_size * self.model.d_model) if fp8 else 0
        angles = self.model.max_seq_len * self.model.geo_head_dim * 4 if self.model.rope else 0
        self._take("weights", _stored_parameters(self.model) * self.sizes.stored + copies + angles)
        self._take("optimizer", state_bytes(self.model, optimizer))
        if self.on_cuda:
            self._take("context", CONTEXT_BYTES)
            self._take("workspace", WORKSPACE_BYTES)

    @property
    def table(self) -> int:
        """Entries of the embedding, which is the output head too."""
        return self.model.padded_vocab_size * self.model.d_model

    # ---- the ledger

    def _take(self, part: str, size: int) -> int:
        """``size`` bytes more from now on; returned, for the :meth:`_give` to come."""
        self.live[part] += size
        coming_and_going = self.live["activations"] + self.live["loss head"] + self.live["gradients"]
        unused = ALLOCATOR_BYTES + int(coming_and_going * ALLOCATOR_SHARE)
        self.live["allocator"] = unused if self.on_cuda else 0
        if sum(self.live.values()) > sum(self.worst.values()):
            self.worst = dict(self.live)
        return size

    def _give(self, part: str, size: int) -> None:
        self.live[part] -= size
        assert self.live[part] >= 0, part

    def _pass(self, part: str, size: int) -> None:
        """``size`` bytes that are there for a moment only."""
        self._give(part, self._take(part, size))

    # ---- the step

    def micro_batch(self, *, first: bool) -> None:
        """Forward and backward; ``first``: of the step, so that there are no gradients yet."""
        sizes, n_layers = self.sizes, self.model.n_layers
        casts = n_layers * sizes.casts if sizes.cast_with_graph else 0
        self._take("activations", casts + self.bias)
        # Every block's input, and the last one's output, which is the final norm's input.
        self._take("activations", (n_layers + 1) * sizes.stream)
        kept = sizes.kept + (0 if sizes.cast_with_graph else sizes.casts)
        self._take("activations", (n_layers - self.recomputed) * kept)
        head = self._head()
        head_gradient = self._head_backward(head)
        self._final_norm_backward()
        for layer in reversed(range(n_layers)):
            if layer < self.recomputed:
                self._take("activations", kept)
                self._pass("activations", sizes.casts + sizes.stream)  # the output once more, which nobody reads
            self._block_backward(kept, first)
        self._embedding_backward(head_gradient, first)
        self._give("activations", casts + self.bias)

    def _head(self) -> int:
        """The loss head's forward pass; what it keeps."""
        value, stored = self.sizes.value, self.sizes.stored
        chunk = min(self.tokens, HEAD_CHUNK_TOKENS) * self.model.padded_vocab_size * value
        several = self.tokens > HEAD_CHUNK_TOKENS
        # Hidden states and their gradient, targets; the head's matrix in the activations' precision.
        hidden = self._take("loss head", self.sizes.stream)
        kept = self._take("loss head", self.sizes.stream + self.tokens * 8)
        weight = self._take("loss head", self.table * value if value < stored else 0)
        # The weight's gradient: of one chunk as it is, of several the fp32 sum and the last chunk's.
        kept += self._take("loss head", self.table * (4 if several else value))
        self._pass("loss head", chunk + (self.table * value if several else 0))
        self._give("loss head", weight + hidden)
        return kept

    def _head_backward(self, kept: int) -> int:
        """Scale what the head kept: (N, d) for the blocks; the matrix's gradient waits for the embedding's."""
        stored, value = self.sizes.stored, self.sizes.value
        product = 4 if self.tokens > HEAD_CHUNK_TOKENS else value
        self._take("activations", self.sizes.stream)
        scaled = self._take("loss head", self.table * product)
        gradient = self._take("loss head", self.table * stored if stored != product else 0)
        self._give("loss head", kept + (scaled if gradient else 0))
        return gradient or scaled

    def _final_norm_backward(self) -> None:
        """The gradient that came in goes, and the norm's input."""
        self._take("activations", self.sizes.stream)
        self._give("activations", 2 * self.sizes.stream)

    def _block_backward(self, kept: int, first: bool) -> None:
        """From the gradient of a block's output to that of its input; gives back all that it kept."""
        s = self.sizes
        stages = self._fused_stages() if self.config.train.fused_blocks else self._autograd_stages(kept)
        assert sum(stage.freed for stage in stages) == kept
        for stage in stages:
            grown = self._take("gradients", stage.matrices * s.stored)
            # Products are in 16 bit also where weights are wider, and then their gradient is for a moment there twice.
            widened = stage.matrices * s.value if s.value < s.stored and not self.eight_bit else 0
            self._pass("activations", stage.temporary + widened)
            if not first:
                self._give("gradients", grown)
            self._give("activations", stage.freed)
        self._give("activations", s.stream)  # its input; of the output's and the input's gradient one is left

    def _fused_stages(self) -> list[_Stage]:
        """The backward of :mod:`oneb.model.fused`: behind attention, attention, before it.

        Locals of a function live until it returns, so temporaries add up; fp8 transposes last one product.
        """
        model, s, n = self.model, self.sizes, self.tokens
        d, d_ff, heads_out, qkv = model.d_model, model.d_ff, model.n_heads * model.v_head_dim, sum(qkv_widths(model))
        queries, keys, values = (model.n_heads * model.qk_head_dim, model.n_kv_heads * model.qk_head_dim,
                                 model.n_kv_heads * model.v_head_dim)
        b, o = s.value, s.operand
        # Behind attention: dact, dgates, dh, dtotal, dy; in fp8 what a product transposes or casts beside them.
        made = [d_ff * b, 2 * d_ff * o, d * b, d * b, heads_out * b]
        beside = [2 * d + d_ff, 0, 2 * d_ff + d, 0, 2 * d + heads_out] if o < b else [0] * 5
        if self.calibrating:
            beside[1] = 2 * d_ff * b  # the magnitudes of dgates
        behind = max(sum(made[:i + 1]) + beside[i] for i in range(5))
        # Attention's own: its input's and output's gradients, dq summed in fp32, and our kernel's packed rows.
        copies = _attention_copies(model, compute_dtype(self.config.train))
        wide = max(queries + keys + values, copies)
        inside = d * b + heads_out * b + wide * b + queries * 4 + model.n_heads * 2 * (4 + NARROW_HEAD_DIM * b // 2)
        before = d * b + (queries + keys + values) * b + max(qkv * o + d * b + (qkv + d if o < b else 0),
                                                             qkv * o + 2 * d * b)
        freed_behind = (d + 2 * d_ff) * b + (d + d_ff) * o + (heads_out if o < b else 0) + 4
        freed_inside = heads_out * b + 4 * model.n_heads + copies * b
        rest = s.kept - n * (freed_behind + freed_inside)
        # The gradient that reaches the block is there already; it is one of those counted before attention.
        return [_Stage(n * behind, d * (heads_out + 3 * d_ff), n * freed_behind),
                _Stage(n * (inside - d * b), 0, n * freed_inside),
                _Stage(n * (before - d * b), d * qkv, rest)]

    def _autograd_stages(self, kept: int) -> list[_Stage]:
        """Autograd's and the compiler's: the gradients of gate and up; others take the place of what was saved."""
        model, s = self.model, self.sizes
        matrices = model.d_model * (sum(qkv_widths(model)) + model.n_heads * model.v_head_dim + 3 * model.d_ff)
        return [_Stage(self.tokens * (2 * model.d_ff + model.d_model) * s.value, matrices, kept)]

    def _embedding_backward(self, head_gradient: int, first: bool) -> None:
        """A dense gradient of the whole table, to which the head's is added."""
        s, d = self.sizes, self.model.d_model
        sums = 0
        if self.tokens > _SORTED_FROM_TOKENS:
            rows = self.tokens // _ROWS_A_PARTIAL_SUM + min(self.tokens, self.model.vocab_size)
            sums = rows * d * 4 + self.tokens * 32
        widened = self.tokens * d * s.stored if s.value < s.stored else 0
        table = self.table * s.stored
        self._take("gradients", table)
        self._pass("activations", widened + sums)
        self._give("loss head", head_gradient)
        self._give("activations", s.stream)
        if not first:
            self._give("gradients", table)

    def update(self) -> None:
        """The optimizer's step."""
        if not (self.on_cuda and self.config.optim.fused):
            largest = max(self.table, 2 * self.model.d_model * self.model.d_ff)
            self._pass("optimizer", min(_UPDATE_CHUNK, largest) * _UPDATE_BYTES)
