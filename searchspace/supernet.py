"""`Supernet`: one maximal tensor per parameter, and every subnetwork as views of them.

A view is an ordinary `Subnet` whose parameters are leading slices of the maximal tensors. Each
slice is a leaf of autograd, and its gradient *is* the matching slice of the maximal gradient:
`backward` adds straight into it. Slicing inside the graph (as `functional_call` on sliced tensors
would) pads every gradient to full size and was measured to cost 18-29% more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, MixerSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block, reset_sub_block
from searchspace.subnet import Subnet, block_name


class Supernet:
    """Shared weights for every arch of a space.

    Mixers and FFNs of one slot share parameters that have the same name (`q_proj`, `up_proj`, ...);
    a smaller arch uses the leading rows and columns. Running statistics of norms are shared in the
    same way, and updated in place by views that train.

    `norm_blend` is how much of a layer norm is still mixed into norms that are annealed into
    foldable ones (PRepBN): 1 when training starts, 0 from some point on.

    Args:
        space: the search space.
        generator: draws the initial weights.
    """

    def __init__(self, space: SearchSpace, generator: torch.Generator) -> None:
        self.space = space
        self.params: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self.norm_blend = 0.0
        self._grads: dict[str, Tensor] = {}
        self._touched: set[str] = set()
        for slot in range(space.num_layers):
            for spec in _maximal_specs(space):
                self._add(f"blocks.{block_name(slot, spec)}.", spec, generator)
        for spec in _maximal_ends(space):
            self._add("ends.", spec, generator)

    def _add(self, prefix: str, spec: SubBlockSpec, generator: torch.Generator) -> None:
        """Add a sub-block's parameters; where a name exists already, grow it to cover both."""
        block = build_sub_block(spec)
        reset_sub_block(block, generator, self.space.num_layers)
        for name, value in block.named_parameters():
            old = self.params.get(prefix + name)
            grown = value.detach() if old is None else _grown(old.detach(), value.detach())
            if old is None or grown is not old:
                self.params[prefix + name] = nn.Parameter(grown)
        for name, buffer in block.named_buffers():
            have = self.buffers.get(prefix + name)
            self.buffers[prefix + name] = buffer if have is None else _grown(have, buffer)

    @property
    def device(self) -> torch.device:
        """Where the maximal tensors are."""
        return next(iter(self.params.values())).device

    def to(self, device: torch.device) -> Supernet:
        """Bring all tensors to a device; returns itself.

        On another one the parameters are new: views, gradients and optimizers made before are of
        the old ones.
        """
        if device != self.device:
            self.params = {n: nn.Parameter(p.detach().to(device)) for n, p in self.params.items()}
            self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
            self._grads, self._touched = {}, set()
        return self

    def view(self, arch: Arch, train: bool = False) -> Subnet:
        """Return the arch's network on the shared weights: no copy, changes show at once.

        Args:
            arch: an arch of the space.
            train: let `backward` add into the shared gradients (see `start_step`), and norms
                update their running statistics.

        Raises:
            UserError: when the arch needs more than the maximal tensors hold.
        """
        with torch.device("meta"):
            subnet = Subnet(arch)
        for module_name, module in subnet.named_modules():
            for name, value in list(module.named_parameters(recurse=False)):
                full_name = f"{module_name}.{name}"
                module._parameters[name] = self._slice(full_name, value.shape, train)
            for name, buffer in list(module.named_buffers(recurse=False)):
                index = _leading(buffer.shape)
                module._buffers[name] = self.buffers[f"{module_name}.{name}"][index]
            if hasattr(module, "blend"):
                module.blend = self.norm_blend
        return subnet.train(train)

    def _slice(self, name: str, shape: torch.Size, train: bool) -> nn.Parameter:
        maximal = self.params.get(name)
        if maximal is None or any(n > m for n, m in zip(shape, maximal.shape, strict=True)):
            have = "is absent" if maximal is None else f"has shape {tuple(maximal.shape)}"
            raise UserError(
                f"the arch needs {name} of shape {tuple(shape)}, which {have} in the supernet of "
                f"space {self.space.name!r}; choose an arch of that space"
            )
        index = _leading(shape)
        leaf = nn.Parameter(maximal.detach()[index], requires_grad=train)
        if train:
            if name not in self._grads:
                self._grads[name] = torch.zeros_like(maximal)
            self._touched.add(name)
            leaf.grad = self._grads[name][index]
        return leaf

    def start_step(self) -> None:
        """Forget all gradients; call before the first `view` of a step."""
        if self._grads:
            torch._foreach_zero_(list(self._grads.values()))
        self._touched.clear()

    def mark_used(self, names: Iterable[str]) -> None:
        """Say that parameters get gradients in this step from a view that was made before it."""
        self._touched.update(names)

    def trained_in_place(self) -> list[Tensor]:
        """Return what forward and backward passes of views change: gradients and statistics."""
        return [*self._grads.values(), *self.buffers.values()]

    def publish_gradients(self) -> None:
        """Set `.grad` of the maximal parameters; None where no arch of the step used them.

        An optimizer then leaves unused operators alone, instead of moving them by stale momentum.
        """
        for name, param in self.params.items():
            param.grad = self._grads[name] if name in self._touched else None

    def extract(self, arch: Arch) -> Subnet:
        """Return the arch's network with its own copy of the weights."""
        subnet = self.view(arch)
        for module in subnet.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                copy = value.detach().clone(memory_format=torch.contiguous_format)
                module._parameters[name] = nn.Parameter(copy)
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
        return subnet

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the maximal parameters by name."""
        yield from self.params.items()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the maximal tensors by name, parameters and running statistics."""
        return {**{name: param.detach() for name, param in self.params.items()}, **self.buffers}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in.

        Raises:
            UserError: when names or shapes are not those of this supernet.
        """
        mine = self.state_dict()
        if set(tensors) != set(mine):
            odd = sorted(set(tensors) ^ set(mine))[0]
            raise UserError(
                f"the weights are not of space {self.space.name!r}: {odd!r} is on one side only"
            )
        for name, tensor in mine.items():
            if tensors[name].shape != tensor.shape:
                raise UserError(
                    f"the weights are not of space {self.space.name!r}: {name} has shape "
                    f"{tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name])


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """Return a tensor that covers both; where they overlap, the old one holds."""
    shape = [max(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
    if list(old.shape) == shape:
        return old
    grown = torch.zeros(shape, dtype=old.dtype)
    grown[_leading(new.shape)] = new
    grown[_leading(old.shape)] = old
    return grown


def _leading(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _maximal_ends(space: SearchSpace) -> list[EndsSpec]:
    """Return the widest ends, and the widest with a map behind the embedding if those have none."""
    widths, embedded = sorted(space.d_model, reverse=True), space.family.embedding_size
    narrower = widths[1:2] if widths[0] == embedded else []
    return [EndsSpec(d, space.vocab_size, space.family) for d in widths[:1] + narrower]


def _maximal_specs(space: SearchSpace) -> list[SubBlockSpec]:
    """Return specs whose parameters together cover those of every arch of the space.

    Sizes only matter at the largest width, and of the other choices only those that can change
    a parameter's shape: heads, operator, options, norm and whether keys and values are shared.
    """
    wanted: dict[tuple[object, ...], SubBlockSpec] = {}
    placements = {"peri"} & set(space.norm_placement) or {space.norm_placement[0]}
    for spec in space.sub_blocks():
        if isinstance(spec, EndsSpec) or spec.d_model != max(space.d_model):
            continue
        if spec.placement not in placements:
            continue
        if isinstance(spec, MixerSpec):
            if spec.kv_shared:
                continue  # its parameters are some of those of the layer that does not share
            key: tuple[object, ...] = (
                spec.mixer, spec.options, spec.num_heads, spec.num_kv_heads, spec.norm,
            )  # fmt: skip
        else:
            if spec.intermediate_size != max(space.intermediate_size):
                continue
            key = (spec.ffn, spec.options, spec.norm)
        wanted.setdefault(key, spec)
    return sorted(wanted.values(), key=lambda s: -getattr(s, "num_heads", 0))
