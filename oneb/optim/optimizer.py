"""Lion and AdamW over named parameters: fp32 or 8-bit state, stochastic rounding, no host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oneb.errors import OnebError
from oneb.kernels import optimizer_step, optimizer_step8
from oneb.kernels.runtime import triton_available

PARAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_8BIT_ELEMENTS = 4096  # of a matrix; below, fp32 state costs nothing


def applies_decay(param: nn.Parameter) -> bool:
    """Whether weight decay acts on this parameter: on matrices, and on nothing else.

    That leaves out norms, biases, learned temperatures (all below 2-D) and whatever the model marks
    with ``param.no_weight_decay = True`` (null keys and values, which are 2-D but no matrices). The
    tied embedding is decayed: it is also the output head, a matrix like the others.
    """
    return param.ndim >= 2 and not getattr(param, "no_weight_decay", False)


def has_8bit_state(param: nn.Parameter) -> bool:
    """Whether an 8-bit optimizer keeps this parameter's moments in 8 bits: those of matrices that are not tiny.

    Norms, temperatures and the like are few, and sensitive: each element acts on a whole channel or head.
    """
    return applies_decay(param) and param.numel() >= MIN_8BIT_ELEMENTS


@dataclass(frozen=True)
class _Entry:
    """One trained parameter and what the optimizer keeps for it."""

    name: str
    index: int  # place in the model; part of its rounding noise's key
    param: nn.Parameter
    weight_decay: float
    state: dict[str, Tensor]  # a moment: fp32 or, with "<moment>_scale" beside it, codes; shaped like the parameter


class Optimizer:
    """What Lion and AdamW share: parameters, decay, state and its checkpointing.

    Build one with ``build_optimizer``. Weights change in place; ``step`` never waits for the device.

    Attributes:
        kind: "lion", "adamw", "lion8bit" or "adamw8bit".
        fused: one Triton kernel a parameter (True) or the plain-torch twin; the same bits either way.
            False whatever was asked for when a parameter is off CUDA or Triton is missing.
        n_updates: calls of ``step`` that this state has seen, skipped ones included.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    updates: ClassVar[tuple[Callable[..., None], Callable[..., None]]]  # of one parameter: twin, kernel
    # Of an 8-bit optimizer: the codes of each moment, and what updates them.
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {}
    updates_8bit: ClassVar[tuple[Callable[..., None], ...]] = ()

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *,
        betas: tuple[float, float], weight_decay: float, seed: int, fused: bool,
    ) -> None:
        _check_settings(betas, weight_decay)
        self.betas = betas
        self.seed = seed
        self.n_updates = 0
        self._entries = [
            _Entry(
                name, index, param,
                weight_decay=weight_decay if applies_decay(param) else 0.0,
                state=self._new_state(param),
            )
            for index, (name, param) in enumerate(_trained(named_parameters))
        ]
        on_cuda = all(entry.param.is_cuda for entry in self._entries)
        self.fused = fused and on_cuda and triton_available()

    def _new_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        if not self.code_dtypes or not has_8bit_state(param):
            return {name: torch.zeros_like(param, dtype=torch.float32) for name in self.state_names}
        n_blocks = optimizer_step8.n_state_blocks(param.numel())
        state = {}
        for name in self.state_names:
            state[name] = torch.zeros_like(param, dtype=self.code_dtypes[name])
            state[f"{name}_scale"] = torch.zeros(n_blocks, device=param.device)
        return state

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters, in the model's order."""
        return [entry.param for entry in self._entries]

    @property
    def decayed_names(self) -> tuple[str, ...]:
        """Names of the parameters that weight decay acts on; the rest are never decayed."""
        return tuple(entry.name for entry in self._entries if applies_decay(entry.param))

    @torch.no_grad()
    def step(self, lr: float, step: int, grad_scale: Tensor) -> None:
        """Update every parameter that has a gradient.

        Args:
            lr: learning rate of this step.
            step: the run's step number; with the seed it picks the rounding noise, so that a resumed
                run rounds as the uninterrupted one would have.
            grad_scale: 0-dim fp32 tensor on the parameters' device, from ``clip_scale``. Not finite =
                no weight and no state changes.
        """
        self.n_updates += 1
        for entry in self._entries:
            grad = entry.param.grad
            if grad is None:
                continue
            key = optimizer_step.rounding_key(self.seed, step, entry.index)
            self._step_one(entry, grad.contiguous(), grad_scale, lr=float(lr), key=key)

    def _step_one(self, entry: _Entry, grad: Tensor, grad_scale: Tensor, **settings: Any) -> None:
        coded = len(entry.state) > len(self.state_names)
        update = (self.updates_8bit if coded else self.updates)[self.fused]
        update(
            entry.param, grad, *entry.state.values(), grad_scale,
            betas=self.betas, weight_decay=entry.weight_decay, **settings,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros when their memory must stay in place."""
        for param in self.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """``{"kind": str, "n_updates": int, "state": {parameter name: {state name: tensor}}}``.

        The tensors are the live ones, not copies: save them, or clone them, before the next step.
        Hyperparameters are the configuration's business and are not in here.
        """
        return {
            "kind": self.kind,
            "n_updates": self.n_updates,
            "state": {entry.name: dict(entry.state) for entry in self._entries},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from what ``state_dict()`` gave; the tensors are copied.

        Raises:
            OnebError: if the state is another optimizer's, or its parameter names, state names, shapes
                or dtypes differ; nothing has changed then.
        """
        faults = self._faults_in(state_dict)
        if faults:
            listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise OnebError(
                f"this checkpoint's optimizer state does not fit: {listed}. Resume with the model flags "
                "and the optimizer of the run that wrote it"
            )
        self.n_updates = int(state_dict["n_updates"])
        for entry in self._entries:
            for key, tensor in entry.state.items():
                tensor.copy_(state_dict["state"][entry.name][key])

    def _faults_in(self, state_dict: dict[str, Any]) -> list[str]:
        """Each reason why a state cannot be loaded, as "what was given: what was wanted"."""
        missing = {"kind", "n_updates", "state"} - set(state_dict)
        if missing:
            return [f"it lacks {', '.join(sorted(missing))}"]
        if state_dict["kind"] != self.kind:
            return [f"it is {state_dict['kind']}'s, wanted {self.kind}'s"]
        given, wanted = state_dict["state"], self.state_dict()["state"]
        faults = [f"unexpected parameter {name}" for name in given if name not in wanted]
        for name, tensors in wanted.items():
            if name not in given:
                faults.append(f"missing parameter {name}")
            elif set(given[name]) != set(tensors):
                faults.append(f"{name} has {sorted(given[name])}, wanted {sorted(tensors)}")
            else:
                faults += [
                    f"{name}.{key} is {_describe(given[name][key])}, wanted {_describe(tensor)}"
                    for key, tensor in tensors.items() if _describe(given[name][key]) != _describe(tensor)
                ]
        return faults


class Lion(Optimizer):
    """Chen et al. 2023 (arXiv 2302.06675): the sign of an interpolated momentum; one fp32 state."""

    kind = "lion"
    state_names = ("exp_avg",)
    updates = (optimizer_step.lion_step_plain, optimizer_step.lion_step_fused)


class AdamW(Optimizer):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), with torch.optim.AdamW's arithmetic; two fp32 states."""

    kind = "adamw"
    state_names = ("exp_avg", "exp_avg_sq")
    updates = (optimizer_step.adamw_step_plain, optimizer_step.adamw_step_fused)

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *,
        betas: tuple[float, float], eps: float, weight_decay: float, seed: int, fused: bool,
    ) -> None:
        super().__init__(named_parameters, betas=betas, weight_decay=weight_decay, seed=seed, fused=fused)
        if not eps > 0:
            raise OnebError(f"AdamW eps {eps}: wanted a positive number; the usual one is 1e-8")
        self.eps = eps

    def _step_one(self, entry: _Entry, grad: Tensor, grad_scale: Tensor, **settings: Any) -> None:
        super()._step_one(entry, grad, grad_scale, eps=self.eps, n_updates=self.n_updates, **settings)


class Lion8bit(Lion):
    """Lion with its momentum in 8 bits where ``has_8bit_state``: :mod:`oneb.kernels.optimizer_step8`."""

    kind = "lion8bit"
    code_dtypes = {"exp_avg": torch.int8}
    updates_8bit = (optimizer_step8.lion8bit_step_plain, optimizer_step8.lion8bit_step_fused)


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits where ``has_8bit_state``: :mod:`oneb.kernels.optimizer_step8`."""

    kind = "adamw8bit"
    code_dtypes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    updates_8bit = (optimizer_step8.adamw8bit_step_plain, optimizer_step8.adamw8bit_step_fused)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *,
    kind: str, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float, seed: int,
    fused: bool = True,
) -> Optimizer:
    """The optimizer of a run.

    Args:
        named_parameters: ``model.named_parameters()`` of the model before torch.compile or DDP wrap it,
            as the names key the checkpoint. Contiguous bf16, fp16 or fp32; frozen ones are left out.
        kind: "lion", "adamw", "lion8bit" or "adamw8bit".
        betas: Lion: of the update and of the momentum, in the paper (0.9, 0.99). AdamW: of the two moments.
        eps: AdamW's; Lion has none.
        weight_decay: decoupled; acts where ``applies_decay`` says.
        seed: the run's; 16-bit weights and 8-bit moments take their rounding noise from it.
        fused: use the Triton kernels if the parameters are on CUDA and Triton is there.

    Raises:
        OnebError: for an unknown kind, or a setting or a parameter that cannot work.
    """
    kinds = {cls.kind: cls for cls in (Lion, AdamW, Lion8bit, AdamW8bit)}
    if kind not in kinds:
        raise OnebError(f"optimizer {kind!r}: wanted {', '.join(kinds)}; pass --optimizer lion")
    given = {"eps": eps} if issubclass(kinds[kind], AdamW) else {}
    return kinds[kind](named_parameters, betas=betas, weight_decay=weight_decay, seed=seed, fused=fused, **given)


def _trained(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    trained = [(name, param) for name, param in named_parameters if param.requires_grad]
    assert len({id(param) for _, param in trained}) == len(trained), "a parameter was given twice"
    if not trained:
        raise OnebError("no trainable parameter was given: wanted at least one; unfreeze some of the model")
    for name, param in trained:
        assert param.is_contiguous(), f"{name} is not contiguous"
        if param.dtype not in PARAM_DTYPES:
            raise OnebError(
                f"parameter {name} is {param.dtype}: wanted bf16, fp16 or fp32; "
                "pass --param-dtype bf16 or fp32"
            )
    return trained


def _check_settings(betas: tuple[float, float], weight_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise OnebError(f"optimizer betas {betas}: wanted two numbers from 0 to below 1, such as 0.9 0.99")
    if not weight_decay >= 0:
        raise OnebError(f"weight decay {weight_decay}: wanted 0 or more; the usual one is 0.1")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
