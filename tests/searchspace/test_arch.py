from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError, unknown
from searchspace.family import Family
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec

SOFTMAX = LayerArch(
    mixer="softmax", num_heads=4, num_kv_heads=2, position="rope", ffn="gelu", intermediate_size=24
)
WINDOW = replace(SOFTMAX, mixer="sliding_window", mixer_options={"window": 16})
COLLAPSED = replace(SOFTMAX, mixer_options={"qk": "collapsed"})
INPUT_ONLY = replace(SOFTMAX, mixer_options={"qk": "collapsed", "vo": "identity"})
SKIPPED = LayerArch()


def make_arch(*layers: LayerArch, **fields: int) -> Arch:
    return Arch(**{"d_model": 16, "head_dim": 4, "vocab_size": 7, **fields}, layers=layers)


class TestCanonicalForm:
    @pytest.mark.parametrize(
        ("layer", "ignored"),
        [
            (replace(SOFTMAX, mixer="none"), {"num_heads": 6, "num_kv_heads": 5}),
            (replace(SOFTMAX, mixer="none"), {"position": "rope", "mixer_precision": "int8"}),
            (replace(SOFTMAX, mixer="none"), {"mixer_options": {"window": 3}}),
            (replace(SOFTMAX, intermediate_size=0), {"ffn": "swiglu", "ffn_precision": "int8"}),
            (replace(SOFTMAX, mixer="linear_elu"), {"position": "rope"}),
            (SKIPPED, {"norm": "layernorm", "position": "rope", "ffn": "gelu", "num_heads": 3}),
            (replace(SOFTMAX, mixer="gla"), {"position": "alibi"}),
            (replace(SOFTMAX, mixer="mingru"), {"num_kv_heads": 1}),
            (replace(SOFTMAX, mixer="pool"), {"num_heads": 3, "mixer_precision": "int8"}),
            (COLLAPSED, {"mixer_options": {"qk": "collapsed", "qkv_dconv": 3}}),
            (INPUT_ONLY, {"num_kv_heads": 1}),
            (SKIPPED, {"norm_placement": "post", "kv_shared": True}),
            (replace(SOFTMAX, mixer="sliding_window"), {"mixer_options": {}}),
            (replace(SOFTMAX, mixer="sliding_window"), {"mixer_options": {"window": 64}}),
        ],
    )
    def test_what_does_not_count_does_not_show(
        self, layer: LayerArch, ignored: dict[str, Any]
    ) -> None:
        other = replace(layer, **ignored)
        assert other == layer
        assert hash(other) == hash(layer)
        assert make_arch(other).id == make_arch(layer).id

    @pytest.mark.parametrize(
        "change",
        [
            {"num_heads": 2},
            {"num_kv_heads": 4},
            {"position": "nope"},
            {"mixer_precision": "int8"},
            {"ffn": "relu2"},
            {"intermediate_size": 8},
            {"ffn_precision": "int8"},
            {"norm": "layernorm"},
            {"norm_placement": "peri"},
            {"position": "rope_b500000"},
            {"mixer_options": {"qk": "collapsed"}},
            {"mixer": "gla"},
            {"mixer": "none"},
        ],
    )
    def test_what_counts_shows(self, change: dict[str, Any]) -> None:
        other = replace(SOFTMAX, **change)
        assert other != SOFTMAX
        assert make_arch(other).id != make_arch(SOFTMAX).id

    def test_slots_and_sizes_count(self) -> None:
        archs = [
            make_arch(SOFTMAX, WINDOW),
            make_arch(WINDOW, SOFTMAX),
            make_arch(SOFTMAX, WINDOW, SKIPPED),
            make_arch(SOFTMAX, SKIPPED, WINDOW),
            make_arch(SOFTMAX, WINDOW, d_model=32),
            make_arch(SOFTMAX, WINDOW, vocab_size=8),
            make_arch(SOFTMAX, WINDOW, head_dim=8),
        ]
        assert len({arch.id for arch in archs}) == len(archs)

    def test_a_slot_without_both_halves_is_skipped(self) -> None:
        empty = replace(SOFTMAX, mixer="none", intermediate_size=0)
        assert empty.skip
        assert empty == SKIPPED
        assert make_arch(empty, SOFTMAX).depth == 1

    def test_options_in_any_order_or_form(self) -> None:
        assert replace(WINDOW, mixer_options=(("window", 16),)) == WINDOW
        assert dict(WINDOW.mixer_options) == {"window": 16}

    def test_layers_may_be_a_list(self) -> None:
        listed = Arch(16, 4, 7, [SOFTMAX, SKIPPED])  # type: ignore[arg-type]
        assert listed == make_arch(SOFTMAX, SKIPPED)
        assert hash(listed) == hash(make_arch(SOFTMAX, SKIPPED))


class TestJson:
    def test_round_trip(self) -> None:
        arch = make_arch(SOFTMAX, SKIPPED, WINDOW)
        again = Arch.from_json(arch.to_json())
        assert again == arch
        assert again.id == arch.id
        assert json.loads(arch.to_json())["layers"][1] == {"skip": True}

    def test_the_id_does_not_change_between_versions(self) -> None:
        # Run folders and exported networks are named by it.
        assert make_arch(SOFTMAX, SKIPPED, WINDOW).id == "88df5a05a0"

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{", "is not JSON"),
            ("[1]", "an arch is a mapping with d_model"),
            ('{"d_modle": 1}', "unknown arch field 'd_modle': did you mean 'd_model'"),
            ('{"d_model": 1}', "arch field 'head_dim' is missing"),
            ('{"d_model": 1, "head_dim": 2, "vocab_size": 3, "layers": 5}', "a list of layers"),
            (
                '{"d_model": 1, "head_dim": 2, "vocab_size": 3, "layers": [5]}',
                r"layers\[0\]: a layer",
            ),
            (
                '{"d_model": 1, "head_dim": 2, "vocab_size": 3, "layers": [{"mixr": "gla"}]}',
                r"layers\[0\]: unknown layer field 'mixr': did you mean 'mixer'",
            ),
            (
                '{"d_model": "1", "head_dim": 2, "vocab_size": 3, "layers": []}',
                "d_model='1' must be",
            ),
        ],
    )
    def test_foreign_text(self, text: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            Arch.from_json(text)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"mixer": "sotfmax"}, "unknown mixer 'sotfmax': did you mean 'softmax'"),
            ({"ffn": "gegl"}, "unknown ffn 'gegl'.*did you mean 'geglu'"),
            ({"norm": "rms"}, "unknown norm 'rms': did you mean 'rmsnorm'"),
            ({"norm": "none"}, "norm='none' in a layer that is not skipped; choose 'rmsnorm' or"),
            ({"position": "rop"}, "unknown position 'rop'"),
            ({"mixer_precision": "int3"}, "unknown mixer_precision 'int3'"),
            ({"ffn_precision": "fp16"}, "unknown ffn_precision 'fp16'"),
            ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4; choose 1 or 2 or 4"),
            ({"num_heads": 0}, "at least one head"),
            ({"num_heads": "4"}, "num_heads='4' must be a whole number"),
            ({"num_heads": 4.0}, "num_heads=4.0 must be a whole number"),
            (
                {"intermediate_size": -1},
                "intermediate_size=-1 must be a whole number of at least 0",
            ),
            ({"ffn": "none"}, "ffn='none' with intermediate_size=24"),
            ({"mixer_options": {"window": 3}}, "unknown option of mixer 'softmax' 'window'"),
            (
                {"mixer": "fourier", "mixer_options": {"window": 3}},
                "'fourier' has no options, but 'window' was given",
            ),
            ({"mixer_options": 3}, "mixer_options=3 is no mapping"),
            ({"mixer_options": {"qk": "colapsed"}}, "unknown softmax.qk 'colapsed': did you mean"),
            ({"norm_placement": "sandwich"}, "unknown norm_placement 'sandwich'"),
            ({"position": "rope_x3"}, "position='rope_x3' is not understood"),
        ],
    )
    def test_layer(self, change: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            replace(SOFTMAX, **change)

    @pytest.mark.parametrize("window", [0, -1, 16.0, "16", True])
    def test_window(self, window: Any) -> None:
        with pytest.raises(UserError, match=r"sliding_window.window=.* must be a whole number"):
            replace(WINDOW, mixer_options={"window": window})

    def test_option_name(self) -> None:
        with pytest.raises(UserError, match="'sliding_window' 'windw': did you mean 'window'"):
            replace(WINDOW, mixer_options={"windw": 3})

    @pytest.mark.parametrize(
        ("field", "least"), [("d_model", 1), ("head_dim", 0), ("vocab_size", 1)]
    )
    def test_sizes(self, field: str, least: int) -> None:
        sentence = f"{field}={least - 1} must be a whole number of at least {least}"
        with pytest.raises(UserError, match=sentence):
            make_arch(SOFTMAX, **{field: least - 1})

    def test_odd_heads(self) -> None:
        with pytest.raises(UserError, match="head_dim=3 must be even"):
            make_arch(SOFTMAX, head_dim=3)

    def test_unknown_without_a_near_name(self) -> None:
        assert str(unknown("thing", "xyz", ["b", "a"])) == "unknown thing 'xyz': choose one of a, b"


class TestSubBlocks:
    def test_what_a_latency_table_sums_over(self) -> None:
        arch = make_arch(SOFTMAX, SKIPPED, replace(WINDOW, intermediate_size=0))
        mixer = MixerSpec(16, "softmax", 4, 2, 4, "rope")
        window = MixerSpec(16, "sliding_window", 4, 2, 4, "rope", options=(("window", 16),))
        assert list(arch.named_sub_blocks()) == [
            (0, mixer), (0, FFNSpec(16, "gelu", 24)), (2, window),
        ]  # fmt: skip
        assert arch.sub_blocks()[-1] == EndsSpec(16, 7)

    def test_keys_are_unique(self) -> None:
        specs = {
            spec
            for norm in ("rmsnorm", "layernorm")
            for precision in ("fp32", "int8")
            for layer in (SOFTMAX, WINDOW, replace(WINDOW, mixer_options={"window": 8}))
            for spec in make_arch(
                replace(layer, norm=norm, mixer_precision=precision, ffn_precision=precision)
            ).sub_blocks()
        }
        assert len({spec.key for spec in specs}) == len(specs) == 17


class TestUnchanged:
    """Written down before heads could split the width, FFNs had options, embeddings a width."""

    LAYERS = (
        LayerArch("softmax", 4, 2, "rope", "int8", "swiglu", 48, "int4", "layernorm"),
        LayerArch(),
        LayerArch("softmax", 4, 2, "rope", ffn="gelu", intermediate_size=32, kv_shared=True),
        LayerArch("sliding_window", 2, 2, norm_placement="peri", mixer_options={"window": 8}),
    )
    ENCODER = Family("encoder", 3, pooling="class_token", embedding_position="learned", pad_token=0)
    VIT = Family("vit", 5, image_size=8, channels=1, patch_size=2, final_norm="layernorm")

    @pytest.mark.parametrize(
        ("family", "vocab_size", "id", "ends"),
        [
            (Family(), 61, "27cb6d0fed", "ends/d32/v61"),
            (
                ENCODER, 61, "7cef82daad",
                "ends/d32/v61/encoder/num_classes3/poolingclass_token/embedding_positionlearned"
                "/pad_token0",
            ),
            (
                VIT, 0, "b43036ce85",
                "ends/d32/v0/vit/num_classes5/max_tokens16/image_size8/channels1/patch_size2"
                "/final_normlayernorm",
            ),
        ],
    )  # fmt: skip
    def test_ids_and_keys(self, family: Family, vocab_size: int, id: str, ends: str) -> None:
        arch = Arch(32, 8, vocab_size, self.LAYERS, family)
        direction = "" if family.causal else "/bidirectional"
        assert arch.id == id
        assert [spec.key for spec in arch.sub_blocks()] == [
            f"mixer/softmax/d32/h4x2x8/rope/layernorm/int8{direction}",
            "ffn/swiglu/d32/f48/layernorm/int4",
            f"mixer/softmax/d32/h4x2x8/rope/rmsnorm/fp32{direction}/kv_shared",
            "ffn/gelu/d32/f32/rmsnorm/fp32",
            f"mixer/sliding_window_window8/d32/h2x2x8/nope/rmsnorm/fp32/peri{direction}",
            ends,
        ]
