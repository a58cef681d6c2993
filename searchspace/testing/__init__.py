"""`check_operator`: what every mixer, FFN and norm must do, checked by name.

Write an operator, add it to its registry, call ``check_operator("its_name")`` in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from searchspace.errors import UserError, unknown
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS
from searchspace.operator import Operator, canonical_options
from searchspace.precisions import PRECISIONS
from searchspace.specs import PLACEMENTS, FFNSpec, MixerSpec, Options
from searchspace.testing import export_checks, operator_checks, sharing_checks, state_checks
from searchspace.testing.operator_checks import D_MODEL, MAX_TOKENS, Spec, is_causal, is_stateful

Check = Callable[[Spec], None]

EVERY_OPERATOR: tuple[Check, ...] = (
    operator_checks.check_axes,
    operator_checks.check_reset,
    operator_checks.check_shapes,
    operator_checks.check_isolation,
    operator_checks.check_gradients,
    operator_checks.check_bf16,
    operator_checks.check_packed,
    sharing_checks.check_views,
    sharing_checks.check_nested,
    operator_checks.check_meta,
)
EVERY_BIDIRECTIONAL: tuple[Check, ...] = (operator_checks.check_order,)
EVERY_STATE: tuple[Check, ...] = (
    state_checks.check_steps,
    state_checks.check_state_size,
    state_checks.check_rewind,
)
HEADS = ((4, 4), (4, 2), (3, 1), (1, 1))


@dataclass(frozen=True)
class CheckResult:
    """One check that an operator passed.

    Args:
        check: name of the check.
        spec_key: the sub-block it was checked on.
    """

    check: str
    spec_key: str


def check_operator(name: str, onnx: bool = False) -> list[CheckResult]:
    """Check a registered operator in all its forms: heads, positions, options, precisions.

    Checked are: declared `axes` are the parameters' shapes; `reset` sets every parameter; the
    output has the input's shape; a later token changes nothing earlier in a causal form, and
    another sequence changes nothing at all (in an FFN or norm: nor does another token); gradients
    reach every parameter; bfloat16 autocast is finite and close; what is really stored and run in
    low precision is close to what training simulates; the network on shared weights equals its
    extracted copy, which holds the leading slices; cutting an axis leaves the right part of it;
    costs can be counted on the meta device; `torch.export` captures it. Of a bidirectional form
    also: it depends on the order of tokens exactly if it says so. Of what has a state: any split
    into prefill and steps equals one forward pass, the state stays as large as it was made (at any
    length, if declared so), and a step can be done again, which timing needs.

    Args:
        name: a key of `MIXERS`, `FFNS` or `NORMS`.
        onnx: also export to ONNX and run that (needs onnx, onnxscript and onnxruntime; slow).

    Returns:
        What was checked.

    Raises:
        UserError: for an unknown name.
        AssertionError: naming the check, the sub-block and the difference.
    """
    if name not in {**MIXERS, **FFNS, **NORMS}:
        raise unknown("operator", name, [*MIXERS, *FFNS, *NORMS])
    done = []
    for number, spec in enumerate(operator_specs(name)):
        checks: tuple[Check, ...] = EVERY_OPERATOR
        if not is_causal(spec):
            checks += EVERY_BIDIRECTIONAL
        elif is_stateful(spec):
            checks += EVERY_STATE
        if number < 2:
            checks += (export_checks.check_export,)
            checks += (export_checks.check_onnx,) if onnx else ()
        for check in checks:
            try:
                check(spec)
            except Exception as error:
                what = f"{check.__name__} fails for {spec.key}: {error}"
                raise AssertionError(what) from error
            done.append(CheckResult(check.__name__, spec.key))
    return done


def operator_specs(name: str) -> Iterator[Spec]:
    """Yield the sub-blocks an operator is checked on: one thing varies at a time."""
    if name in MIXERS:
        yield from _mixer_specs(name)
    if name in FFNS:
        yield from _ffn_specs(name)
    if name in NORMS:
        for placement in PLACEMENTS:
            yield FFNSpec(D_MODEL, "swiglu", 24, norm=name, placement=placement)
        for mixer in ("softmax", "gla"):
            yield _mixer_spec(mixer, norm=name, num_heads=2, num_kv_heads=1)


def _ffn_specs(name: str) -> Iterator[FFNSpec]:
    # The last variant is the furthest from the default: a stack of the most maps.
    *others, last = _option_variants(name, FFNS[name])
    yield FFNSpec(D_MODEL, name, 24, options=others[0] if others else last)
    yield FFNSpec(D_MODEL, name, 17, options=last)
    for precision in list(PRECISIONS)[1:]:
        yield FFNSpec(D_MODEL, name, 17, precision, options=last)
    yield FFNSpec(D_MODEL, name, 17, placement="peri", options=last)
    for options in others[1:]:
        yield FFNSpec(D_MODEL, name, 17, options=options)


def _mixer_specs(name: str) -> Iterator[MixerSpec]:
    mixer = MIXERS[name]
    others = mixer.positions[1:]
    small, *variants = _option_variants(name, mixer)
    seen: set[MixerSpec] = set()

    def new(**values: Any) -> Iterator[MixerSpec]:
        spec = _mixer_spec(name, **values)
        if spec not in seen:
            seen.add(spec)
            yield spec

    for direction in mixer.directions:
        causal = direction == "causal"
        for heads in HEADS if causal else HEADS[1:2]:
            yield from new(num_heads=heads[0], num_kv_heads=heads[1], options=small, causal=causal)
        for position in others:
            yield from new(position=position, options=small, causal=causal)
        for variant in variants:
            yield from new(options=variant, causal=causal)
    causal = "causal" in mixer.directions
    if mixer.has_linears:
        for precision in list(PRECISIONS)[1:]:
            yield from new(options=small, precision=precision, causal=causal)
    if mixer.can_share_kv({**mixer.options, **dict(small)}):
        yield from new(options=small, kv_shared=True, causal=causal)


def _mixer_spec(name: str, **values: Any) -> MixerSpec:
    mixer = MIXERS[name]
    defaults: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "position": mixer.positions[0],
        "max_tokens": MAX_TOKENS if mixer.bounded else 0,
    }
    values = {**defaults, **values}
    if mixer.heads == "equal":
        values["num_kv_heads"] = values["num_heads"]
    if mixer.heads == "none":
        values |= {"num_heads": 0, "num_kv_heads": 0, "head_dim": 0}
    return MixerSpec(D_MODEL, name, **values)


def _option_variants(name: str, operator: type[Operator]) -> list[Options]:
    """Return small values of all sizes together, then the defaults, then every other choice."""
    sizes = {k: v for k, v in operator.options.items() if k not in operator.option_choices}
    small = {k: max(1, v // 8) for k, v in sizes.items() if isinstance(v, int)}
    wanted: list[dict[str, Any]] = [small, {}]
    for option, choices in operator.option_choices.items():
        wanted += [{**small, option: choice} for choice in choices]
    found: dict[Options, None] = {}
    for options in wanted:
        try:
            found[canonical_options("operator", name, operator, options)] = None
        except UserError:
            continue  # a combination that the operator refuses
    return list(found)
