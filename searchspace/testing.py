"""`check_operator`: what every mixer, FFN and norm must do, checked by name.

Write an operator, add it to its registry, call ``check_operator("its_name")`` in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from searchspace import _mixer_checks, _operator_checks
from searchspace._operator_checks import D_MODEL, Spec
from searchspace.errors import unknown
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS
from searchspace.specs import FFNSpec, MixerSpec, Options

Check = Callable[[Spec], None]

EVERY_OPERATOR: tuple[Check, ...] = (
    _operator_checks.check_axes,
    _operator_checks.check_reset,
    _operator_checks.check_shapes,
    _operator_checks.check_causal,
    _operator_checks.check_gradients,
    _operator_checks.check_bf16,
    _operator_checks.check_packed,
    _operator_checks.check_views,
)
EVERY_MIXER: tuple[Check, ...] = (
    _mixer_checks.check_steps,
    _mixer_checks.check_state_size,
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


def check_operator(name: str) -> list[CheckResult]:
    """Check a registered operator at several sizes, head layouts, positions and precisions.

    Checked are: declared `axes` are the parameters' shapes; `reset` sets every parameter; the
    output has the input's shape; a later token changes nothing earlier (in an FFN or norm: nothing
    else); gradients reach every parameter; bfloat16 autocast is finite and close; real int8 is
    close to simulated int8; the network on shared weights equals its extracted copy, which holds
    the leading slices. Of a mixer also: any split into prefill and steps equals one forward pass,
    and the state stays as large as it was made (of a recurrent mixer: at any length).

    Args:
        name: a key of `MIXERS`, `FFNS` or `NORMS`.

    Returns:
        What was checked.

    Raises:
        UserError: for an unknown name.
        AssertionError: naming the check, the sub-block and the difference.
    """
    if name not in {**MIXERS, **FFNS, **NORMS}:
        raise unknown("operator", name, [*MIXERS, *FFNS, *NORMS])
    done = []
    for spec in operator_specs(name):
        checks = EVERY_OPERATOR + (EVERY_MIXER if isinstance(spec, MixerSpec) else ())
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
        first, options = MIXERS[name].positions[0], _option_variants(name)
        for heads in HEADS:
            yield MixerSpec(D_MODEL, name, *heads, 8, first, options=options[-1])
        for position in MIXERS[name].positions[1:]:
            yield MixerSpec(D_MODEL, name, 4, 2, 8, position, options=options[-1])
        for variant in options[:-1]:
            yield MixerSpec(D_MODEL, name, 4, 2, 8, first, options=variant)
        yield MixerSpec(D_MODEL, name, 4, 2, 8, first, "int8", options=options[-1])
    if name in FFNS:
        yield FFNSpec(D_MODEL, name, 24)
        yield FFNSpec(D_MODEL, name, 17)
        yield FFNSpec(D_MODEL, name, 17, "int8")
    if name in NORMS:
        yield FFNSpec(D_MODEL, "swiglu", 24, norm=name)
        for mixer in MIXERS:
            yield MixerSpec(D_MODEL, mixer, 2, 1, 8, norm=name, options=_option_variants(mixer)[0])


def _option_variants(name: str) -> list[Options]:
    """Return the default options and, if there are whole numbers in them, much smaller ones."""
    default = tuple(sorted(MIXERS[name].options.items()))
    small = tuple((k, max(1, v // 8) if isinstance(v, int) else v) for k, v in default)
    return list(dict.fromkeys([default, small]))
