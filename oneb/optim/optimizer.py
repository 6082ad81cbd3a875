"""Lion and AdamW over named parameters: fp32 state, stochastic rounding, no host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oneb.errors import OnebError
from oneb.kernels import optimizer_step
from oneb.kernels.runtime import triton_available

PARAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def applies_decay(param: nn.Parameter) -> bool:
    """Whether weight decay acts on this parameter: on matrices, and on nothing else.

    That leaves out norms, biases, learned temperatures (all below 2-D) and whatever the model marks
    with ``param.no_weight_decay = True`` (null keys and values, which are 2-D but no matrices). The
    tied embedding is decayed: it is also the output head, a matrix like the others.
    """
    return param.ndim >= 2 and not getattr(param, "no_weight_decay", False)


@dataclass(frozen=True)
class _Entry:
    """One trained parameter and what the optimizer keeps for it."""

    name: str
    index: int  # place in the model; part of its rounding noise's key
    param: nn.Parameter
    weight_decay: float
    state: dict[str, Tensor]  # fp32, shaped like the parameter


class Optimizer:
    """What Lion and AdamW share: parameters, decay, state and its checkpointing.

    Build one with ``build_optimizer``. Weights change in place; ``step`` never waits for the device.

    Attributes:
        kind: "lion" or "adamw".
        fused: one Triton kernel a parameter (True) or the plain-torch twin; the same bits either way.
            False whatever was asked for when a parameter is off CUDA or Triton is missing.
        n_updates: calls of ``step`` that this state has seen, skipped ones included.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]

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
                state={key: torch.zeros_like(param, dtype=torch.float32) for key in self.state_names},
            )
            for index, (name, param) in enumerate(_trained(named_parameters))
        ]
        on_cuda = all(entry.param.is_cuda for entry in self._entries)
        self.fused = fused and on_cuda and triton_available()

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

    def _step_one(self, entry: _Entry, grad: Tensor, grad_scale: Tensor, *, lr: float, key: int) -> None:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros when their memory must stay in place."""
        for param in self.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """``{"kind": str, "n_updates": int, "state": {parameter name: {state name: fp32 tensor}}}``.

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

    def _step_one(self, entry: _Entry, grad: Tensor, grad_scale: Tensor, *, lr: float, key: int) -> None:
        update = optimizer_step.lion_step_fused if self.fused else optimizer_step.lion_step_plain
        update(
            entry.param, grad, entry.state["exp_avg"], grad_scale,
            lr=lr, betas=self.betas, weight_decay=entry.weight_decay, key=key,
        )


class AdamW(Optimizer):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), with torch.optim.AdamW's arithmetic; two fp32 states."""

    kind = "adamw"
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *,
        betas: tuple[float, float], eps: float, weight_decay: float, seed: int, fused: bool,
    ) -> None:
        super().__init__(named_parameters, betas=betas, weight_decay=weight_decay, seed=seed, fused=fused)
        if not eps > 0:
            raise OnebError(f"AdamW eps {eps}: wanted a positive number; the usual one is 1e-8")
        self.eps = eps

    def _step_one(self, entry: _Entry, grad: Tensor, grad_scale: Tensor, *, lr: float, key: int) -> None:
        update = optimizer_step.adamw_step_fused if self.fused else optimizer_step.adamw_step_plain
        update(
            entry.param, grad, entry.state["exp_avg"], entry.state["exp_avg_sq"], grad_scale,
            lr=lr, betas=self.betas, eps=self.eps, weight_decay=entry.weight_decay,
            n_updates=self.n_updates, key=key,
        )


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *,
    kind: str, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float, seed: int,
    fused: bool = True,
) -> Optimizer:
    """The optimizer of a run.

    Args:
        named_parameters: ``model.named_parameters()`` of the model before torch.compile or DDP wrap it,
            as the names key the checkpoint. Contiguous bf16, fp16 or fp32; frozen ones are left out.
        kind: "lion" or "adamw".
        betas: Lion: of the update and of the momentum, in the paper (0.9, 0.99). AdamW: of the two moments.
        eps: AdamW's; Lion has none.
        weight_decay: decoupled; acts where ``applies_decay`` says.
        seed: the run's; 16-bit weights take their rounding noise from it.
        fused: use the Triton kernels if the parameters are on CUDA and Triton is there.

    Raises:
        OnebError: for an unknown kind, or a setting or a parameter that cannot work.
    """
    shared = {"betas": betas, "weight_decay": weight_decay, "seed": seed, "fused": fused}
    if kind == "lion":
        return Lion(named_parameters, **shared)
    if kind == "adamw":
        return AdamW(named_parameters, eps=eps, **shared)
    raise OnebError(f"optimizer {kind!r}: wanted lion or adamw; pass --optimizer lion")


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
