"""The report: what is on the page, that it loads nothing, and that it survives missing parts."""

from __future__ import annotations

import hashlib
import html.parser
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nas.report import front_table, write_report
from nas.report.labels import place_labels
from nas.report.markup import fixed, number, tag
from nas.report.run_data import load_run
from nas.report.statistics import comparisons, latency_error
from nas.report.summary import workload_words
from searchspace.errors import UserError

NUM_PICTURES = 10
WORKLOADS = ("prefill_b1_t256", "decode_b1_t256")
SECTION_IDS = (
    *("front", "hypervolume", "predictions", "layers"),
    *("training", "members", "metrics", "facts"),
)
NASTY = "<script>alert('x')</script> & \"q\" $\\frac{1$ \ud800 [red]"


def random_arch(rng: np.random.Generator, num_layers: int = 6) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    for slot in range(num_layers):
        if slot and rng.random() < 0.25:
            layers.append({"skip": True})
            continue
        mixer = str(rng.choice(["softmax", "sliding_window", "linear_elu", "gla", "none"]))
        heads, kv_heads = [(6, 6), (6, 2), (6, 1), (3, 1)][int(rng.integers(4))]
        width = int(rng.choice([0, 96, 192, 384, 768])) if mixer != "none" else 384
        layers.append(
            {
                "mixer": mixer,
                "num_heads": heads if mixer != "none" else 0,
                "num_kv_heads": kv_heads if mixer != "none" else 0,
                "position": str(rng.choice(["rope", "nope"])),
                "mixer_precision": str(rng.choice(["fp32", "int8"])),
                "ffn": str(rng.choice(["relu2", "gelu", "swiglu"])) if width else "none",
                "intermediate_size": width,
                "ffn_precision": str(rng.choice(["fp32", "int8"])),
                "norm": str(rng.choice(["rmsnorm", "layernorm"])),
                "mixer_options": {"window": 64} if mixer == "sliding_window" else {},
            }
        )
    width = int(rng.choice([64, 128, 192]))
    return {"d_model": width, "head_dim": 32, "vocab_size": 1024, "layers": layers}


def record(
    rng: np.random.Generator, size: float, penalty: float, name: str | None = None
) -> dict[str, Any]:
    """A network of relative size 0..1 whose loss is `penalty` above the best of its size."""
    latency_ms = 0.9 + 8.0 * size * float(rng.uniform(0.9, 1.1))
    measured = {WORKLOADS[0]: latency_ms, WORKLOADS[1]: 0.3 + 0.2 * latency_ms}
    loss = 1.31 + 0.55 * (1 - size) ** 2 + penalty
    arch = random_arch(rng)
    digest = hashlib.sha256(repr((arch, size, penalty)).encode()).hexdigest()[:10]
    return {
        "arch_id": digest,
        "arch": arch,
        "name": name,
        "params": int(1.9e6 * (0.12 + size)),
        "weight_bytes": int(5.2e6 * (0.12 + size) * float(rng.uniform(0.6, 1.0))),
        "measured": {"loss": loss, "latency_ms": measured, "peak_mib": 12.0 + 40 * size},
        "predicted": {
            "latency_ms": {k: v * float(rng.normal(1, 0.03)) for k, v in measured.items()}
        },
        "search_loss": loss * float(rng.normal(1.0, 0.01)) if name is None else None,
    }


def front_content(num_members: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = np.linspace(0.02, 1.0, num_members)
    front = [record(rng, float(size), 0.0) for size in sizes]
    uniform = [
        record(rng, size, 0.09, f"softmax d{width} L{depth}")
        for size, width, depth in [
            (1.0, 192, 6),
            (0.7, 192, 3),
            (0.5, 128, 6),
            (0.35, 128, 3),
            (0.2, 64, 6),
            (0.1, 64, 3),
        ]
    ]
    spread = [(float(rng.uniform(0.05, 1)), float(rng.uniform(0.1, 0.6))) for _ in front]
    return {
        "task": "stdlib",
        "unit": "byte",
        "space": "decoder-small",
        "space_size": "3" + "0" * 22,
        "objectives": ["loss", "latency_ms", "weight_bytes"],
        "workload": WORKLOADS[0],
        "workloads": list(WORKLOADS),
        "baselines": {"unigram": 3.31, "bigram": 2.52, "trigram": 1.95},
        "groups": {
            "front": front,
            "random": [record(rng, size, penalty) for size, penalty in spread],
            "uniform": uniform,
        },
        "hypervolume": {
            "front": 0.871,
            "random": 0.702,
            "uniform": 0.655,
            "reference": [1.1] * 3,
            "ideal": [1.3, 1, 1e6],
            "nadir": [2, 9, 5e6],
        },
        "chosen": {
            "best": front[-1]["arch_id"],
            "fastest": front[0]["arch_id"],
            "smallest": front[0]["arch_id"],
            "knee": front[num_members // 3]["arch_id"],
        },
        "latency_error": {
            name: {"mape_percent": 2.31 + i, "kendall_tau": 0.97, "num_networks": 34}
            for i, name in enumerate(WORKLOADS)
        },
        "device": {
            "cpu": "Example CPU @ 2 GHz",
            "num_threads": 2,
            "isa": ["avx2", "avx512f"],
            "memory_gib": 15.6,
            "allocator_tuned": True,
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu"},
    }


def write_run(folder: Path, front: dict[str, Any] | None = None) -> Path:
    """Write a run folder with everything in it, one network exported."""
    front = front or front_content()
    rng = np.random.default_rng(1)
    front_ids = [r["arch_id"] for r in front["groups"]["front"]]
    trials: list[dict[str, Any]] = [
        {
            "number": i,
            "arch_id": f"{i:010x}",
            "state": "failed" if i % 40 == 39 else "complete",
            "values": {},
            "reason": "the loss is nan" if i % 40 == 39 else None,
            "seconds": 0.7,
        }
        for i in range(120)
    ]
    search = {
        "sampler": "predictor",
        "objectives": front["objectives"],
        "constraints": ["latency_ms<=8"],
        "trials": trials,
        "hypervolume": np.maximum.accumulate(0.9 - 0.6 / np.sqrt(np.arange(1, 118))).tolist(),
        "metrics": {
            "synflow": {"kendall_tau": 0.613, "num_archs": 117},
            "grad_norm": {"kendall_tau": 0.482, "num_archs": 117},
            "naswot": {"kendall_tau": -0.121, "num_archs": 117},
        },
    }
    steps = np.arange(1, 1500)
    log = [
        {
            "step": int(s),
            "elapsed_s": 0.18 * int(s),
            "largest": top + noise,
            "smallest": top + 0.8 + noise,
            "random": top + 0.35 + noise,
        }
        for s, top, noise in zip(
            steps, 3 + 4 * np.exp(-steps / 200), rng.normal(0, 0.08, len(steps)), strict=True
        )
    ]
    config = {
        "preset": "decoder-small",
        "budget": "10m",
        "out": str(folder),
        "seed": 7,
        "search": {"sampler": "predictor", "constraints": [], "budget_s": None},
    }
    export = {
        "arch_id": front_ids[0],
        "formats": {
            "hf": {"verified": {"differences": [1e-8, 2.4e-07], "loss": 1.8321, "decode_ms": 1.02}},
            "padded": {"refused": "layer 0 has no softmax"},
        },
    }
    files = {
        "front.json": front,
        "search.json": search,
        "config.json": config,
        f"subnets/{front_ids[0]}/export.json": export,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "supernet").mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(entry) for entry in log)
    (folder / "supernet" / "log.jsonl").write_text(lines + '\n{"step": 15')
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would see: ids, tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = write_run(tmp_path_factory.mktemp("runs") / "quick start", front_content(14))
    source = write_report(folder).read_text(encoding="utf-8")
    return folder, source, Page(source)


def test_every_section_is_there_with_its_figures(whole: tuple[Path, str, Page]) -> None:
    _, source, page = whole
    assert [i for i in page.values("id") if i in SECTION_IDS] == list(SECTION_IDS)
    assert page.tags.count("svg") == NUM_PICTURES
    front = front_content(14)["groups"]["front"]
    best, fastest = front[-1], front[0]
    for expected in (
        f"the best reaches {best['measured']['loss']:.3f} nats/byte "
        f"({best['measured']['loss'] / math.log(2):.3f} bits/byte) on the test split",
        f"the fastest takes {fastest['measured']['latency_ms'][WORKLOADS[0]]:.2f} ms",
        "hypervolume is 0.871 against 0.702 of as many random archs and 0.655 of uniform",
        "predicted latency is 2.3 % off the measured one (mean over 34 networks)",
        "unigram 3.31, bigram 2.52, trigram 1.95",
        "mean absolute error 2.31 % of the measured latency (MAPE), Kendall tau 0.97",
        "120 evaluations, 3 of them failed",
        "minimised: loss, latency_ms, weight_bytes; constraints: latency_ms<=8.",
        "the loss is nan",
        "1499 steps",
        "decode_\u200bms",
        "layer 0 has no softmax",
        "2.400e-07",
        "Example CPU @ 2 GHz",
        "search.sampler predictor",
    ):
        assert expected in page.text, expected
    assert all(record["arch_id"] in page.text for record in front)
    assert len(source) < 2_000_000


def test_members_are_sorted_by_latency_and_chosen_ones_are_tagged(
    whole: tuple[Path, str, Page],
) -> None:
    data = load_run(whole[0])
    latencies = [network.latency_ms[WORKLOADS[0]] for network in data.front_by_latency]
    assert latencies == sorted(latencies) and len(latencies) == 14
    table = whole[1].split('id="members"')[1]
    order = [n.arch_id for n in data.front_by_latency]
    assert [i for i in re.findall(r">([0-9a-f]{10})<", table) if i in order][:14] == order
    row = re.search(rf"<tr>(?:(?!</tr>).)*{order[0]}.*?</tr>", table)
    assert row is not None and ">fastest<" in row[0] and ">smallest<" in row[0]


def test_commands_can_be_pasted_into_a_shell(whole: tuple[Path, str, Page]) -> None:
    folder, _, page = whole
    ids = {r["arch_id"] for r in front_content(14)["groups"]["front"]}
    lines = [line for text in page.texts for line in text.splitlines() if line.startswith("nas ")]
    exported = next(iter(load_run(folder).exports))
    export = shlex.split(lines[0])
    assert export[:5] == ["nas", "export", "--out", str(folder), "--set"]
    key, _, value = export[5].partition("=")
    assert key == "export.choose" and set(json.loads(value)) == ids - {exported}
    generate = [shlex.split(line) for line in lines[1:]]
    assert {Path(words[2]) for words in generate} == {folder / "subnets" / i for i in ids}
    assert {tuple(words[3:]) for words in generate} == {("--prompt", "def ")}


def test_layer_pictures_show_what_the_arch_says(tmp_path: Path) -> None:
    front = front_content()
    arch_id = front["chosen"]["knee"]
    front["chosen"] = {"knee": arch_id}
    knee = next(r for r in front["groups"]["front"] if r["arch_id"] == arch_id)
    window = {
        "mixer": "sliding_window",
        "num_heads": 6,
        "num_kv_heads": 2,
        "position": "rope",
        "mixer_precision": "int8",
        "ffn": "swiglu",
        "intermediate_size": 192,
        "ffn_precision": "fp32",
        "norm": "layernorm",
        "mixer_options": {"window": 64},
    }
    plain = {
        **window,
        "mixer": "none",
        "num_heads": 0,
        "num_kv_heads": 0,
        "mixer_options": {},
        "ffn": "relu2",
        "intermediate_size": 768,
        "ffn_precision": "int8",
    }
    bare = {**window, "ffn": "none", "intermediate_size": 0}
    knee["arch"]["layers"] = [window, {"skip": True}, plain, bare]
    source = write_report(write_run(tmp_path, front)).read_text()
    picture = source.split('class="layers"')[1].split("</section>")[0]
    slots = picture.split('class="slot"')[1:]
    text = [Page(f'<i class="{slot}').text for slot in slots]
    assert len(slots) == 4
    for expected in ("sliding_window", "int8", "6 q × 2 kv · window 64 · rope · layernorm"):  # noqa: RUF001
        assert expected in text[0]
    assert slots[0].count("<u ") == 6 and slots[0].count("<i><u") == 2
    assert "width:25.0%" in slots[0] and "width:100.0%" in slots[2]
    assert "skipped" in text[1] and "no mixer" in text[2] and "no FFN" in text[3]


def test_layer_pictures_of_other_families_and_operators(tmp_path: Path) -> None:
    front = front_content()
    arch_id = front["chosen"]["knee"]
    front["chosen"] = {"knee": arch_id}
    knee = next(r for r in front["groups"]["front"] if r["arch_id"] == arch_id)
    common = {"ffn": "gelu", "intermediate_size": 96, "norm": "unified_norm"}
    softmax = {"mixer": "softmax", "num_heads": 4, "num_kv_heads": 2, "position": "alibi"}
    knee["arch"]["layers"] = [
        {**common, "mixer": "pool", "num_heads": 0, "num_kv_heads": 0, "norm_placement": "peri"},
        {**common, **softmax, "mixer_precision": "ternary", "ffn_precision": "bf16"},
        {**common, **softmax, "kv_shared": True, "norm_placement": "post"},
    ]
    knee["arch"]["family"] = {
        "kind": "vit", "num_classes": 10, "image_size": 8, "patch_size": 2, "channels": 1,
        "pooling": "class_token", "embedding_position": "learned", "final_norm": "layernorm",
    }  # fmt: skip
    source = write_report(write_run(tmp_path, front)).read_text()
    picture = source.split('class="layers"')[1].split("</section>")[0]
    start, *slots = picture.split('class="slot"')
    text = [Page(f'<i class="{slot}').text for slot in [start, *slots]]
    assert "image of 8 pixels in patches of 2 · learned positions · class token" in text[0]
    assert "pool unified_norm (peri)" in text[1] and "kv" not in text[1]
    assert "<u " not in slots[0] and slots[1].count("<u ") == 4
    assert "ternary" in text[2] and "bf16" in text[2] and "alibi" in text[2]
    assert "keys and values of an earlier layer" in text[3] and "(post)" in text[3]
    assert "layernorm · class token · head of 10 classes" in text[3]


def test_every_mixer_has_one_colour_on_the_page(tmp_path: Path) -> None:
    front = front_content(6)
    names = ["softmax", "pool", "hyena", "mamba", "fourier", "flow"]
    for record_, name in zip(front["groups"]["front"], names, strict=True):
        record_["arch"]["layers"] = [{"mixer": name, "ffn": "none", "norm": "rmsnorm"}]
    source = write_report(write_run(tmp_path, front)).read_text()
    swatches = re.findall(r'style="background:(#\w+)"></i>([a-z]+)<', source)
    assert {name for _, name in swatches} == set(names)
    assert len(set(swatches)) == len({colour for colour, _ in swatches}) == len(names)


def test_a_run_that_is_judged_by_accuracy(tmp_path: Path) -> None:
    front = front_content()
    front |= {"unit": "example", "task": "listops", "baselines": {"uniform": 2.303}}
    front["accuracy_baselines"] = {"commonest class": 0.17}
    for group in front["groups"].values():
        for record_ in group:
            record_["measured"]["accuracy"] = 1 - record_["measured"]["loss"] / 2.6
    page = Page(write_report(write_run(tmp_path, front)).read_text())
    best = front["groups"]["front"][-1]["measured"]
    shown = f"{100 * best['accuracy']:.1f} %"
    assert page.tags.count("svg") == NUM_PICTURES + 1
    for expected in (
        f"the best reaches {best['loss']:.3f} nats/example, accuracy {shown} on the test split",
        f"Best accuracy {shown}",
        "commonest class: 17.0 %",
        "Accuracy on the test split against latency",
        "Losses, accuracies, latencies and memory are measured",
        "from searchspace.subnet import Subnet",
        f"Subnet.load({str(tmp_path / 'subnets' / front['chosen']['knee'])!r})",
    ):
        assert expected in page.text, expected
    for wrong in ("nats/byte", "bits/", "nas generate", "n-gram", "nats/token", "writes text"):
        assert wrong not in page.text, wrong
    console = Console(file=io.StringIO(), width=80)
    console.print(front_table(front))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "racy %" in text and "bits" not in text and f"{100 * best['accuracy']:.1f}" in text


def test_energy_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    front = front_content()
    assert "mJ" not in Page(write_report(write_run(tmp_path / "without", front)).read_text()).text
    member = front["groups"]["front"][0]
    member["measured"]["energy_mj"] = {WORKLOADS[1]: 7.125}
    text = Page(write_report(write_run(tmp_path / "with", front)).read_text()).text
    assert text.count("mJ, measured") == 1
    assert "7.12" in text


BOTH = {"largest": 3.0, "smallest": 4.0}


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([{**BOTH, "random": 3.5}],
         "Every step trains the largest network, random ones and the smallest on the same batch."),
        ([BOTH], "Every step trains the largest network and the smallest on the same batch."),
        ([{"largest": 3.0}], "Every step trains the largest network. Each"),
        ([{"random": 3.0}], "Every step trains random networks. Each"),
        ([{"largest": 3.0, "ffn_96": 3.2, "ffn_0": 4.0, "ffn_192": 3.1}],
         "Every step trains the largest network and the same layers with FFN widths 192, 96, 0 on "
         "the same batch."),
        ([{"largest": 3.0}, {"random": 3.2}],
         "Up to step 5 (dotted line) only the largest network was trained; from then on every step "
         "trains random networks. Each"),
        ([{"largest": 3.0}, {**BOTH, "random": 3.5}],
         "from then on every step trains the largest network, random ones and the smallest on"),
    ],
)  # fmt: skip
def test_training_is_told_as_it_was(
    stages: list[dict[str, float]], sentence: str, tmp_path: Path
) -> None:
    write_run(tmp_path)
    rows = [losses for losses in stages for _ in range(5)]
    lines = [json.dumps({"step": i, "elapsed_s": 0.1 * i, **row}) for i, row in enumerate(rows, 1)]
    (tmp_path / "supernet" / "log.jsonl").write_text("\n".join(lines))
    source = write_report(tmp_path).read_text()
    section = Page(source.split('id="training"')[1].split("</section>")[0])
    assert sentence in section.text
    names = ", ".join(load_run(tmp_path).roles)
    assert section.values("aria-label") == [f"Training loss of these networks: {names}"]


def test_page_loads_nothing(whole: tuple[Path, str, Page]) -> None:
    _, source, page = whole
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link|<iframe|<image", source)
    assert page.values("src") == []
    links = page.values("href") + page.values("xlink:href")
    assert links and all(link.startswith("#") for link in links)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(ids)


def test_report_is_the_same_for_the_same_run(whole: tuple[Path, str, Page]) -> None:
    assert write_report(whole[0]).read_text() == whole[1]


def test_names_from_files_are_only_ever_text(tmp_path: Path) -> None:
    front = front_content()
    for record_ in front["groups"]["uniform"]:
        record_["name"] = NASTY
    front["task"] = front["device"]["cpu"] = NASTY
    front["baselines"] = {NASTY: 1.9}
    front["chosen"][NASTY] = front["chosen"]["knee"]
    for layer in front["groups"]["front"][1]["arch"]["layers"]:
        if "mixer" in layer:
            layer.update(
                mixer=NASTY, ffn=NASTY, norm=NASTY, num_heads="9", mixer_options={"<": ">"}
            )
    source = write_report(write_run(tmp_path, front)).read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source.lower()
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") >= 4
    console = Console(file=io.StringIO(), width=200)
    console.print(front_table(front))
    assert "[red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_missing_parts_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("supernet", "subnets"):
        shutil.rmtree(tmp_path / name)
    for name in ("search.json", "config.json"):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path).read_text())
    assert [i for i in page.values("id") if i in SECTION_IDS] == list(SECTION_IDS)
    for sentence in (
        "The record of single evaluations is not in this folder",
        "There is no training log",
        "No training-free metric was compared",
        "No network has been exported yet",
        "There is no config.json",
        "Not exported yet: 4 of 4",
    ):
        assert sentence in page.text, sentence


def test_a_run_that_has_no_front_yet_is_reported(tmp_path: Path) -> None:
    (write_run(tmp_path) / "front.json").unlink()
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("No front has been measured") >= 3
    assert page.tags.count("svg") == 3  # hypervolume curve, training curves, metrics


@pytest.mark.parametrize("keep", ["search.json", "config.json", "supernet"])
def test_any_single_part_makes_a_report(tmp_path: Path, keep: str) -> None:
    write_run(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert write_report(tmp_path).read_text().startswith("<!doctype html>")


def test_front_without_baselines_and_with_unknown_values(tmp_path: Path) -> None:
    front = front_content()
    front["groups"] = {"front": front["groups"]["front"][:1]}
    for key in ("baselines", "chosen", "latency_error", "hypervolume", "device", "versions"):
        del front[key]
    front["unit"] = "token"
    only = front["groups"]["front"][0]
    only["measured"]["peak_mib"] = only["search_loss"] = None
    only["predicted"]["latency_ms"] = {WORKLOADS[0]: float("nan")}
    page = Page(write_report(write_run(tmp_path, front)).read_text())
    assert "nats/token" in page.text and "nats/byte" not in page.text
    assert "measured no random archs and no uniform networks" in page.text
    assert "No network of the front was chosen by name" in page.text
    assert "nothing is compared here" in page.text


def test_a_front_that_loses_is_told_so(tmp_path: Path) -> None:
    front = front_content()
    front["hypervolume"]["random"] = 0.9
    page = Page(write_report(write_run(tmp_path, front)).read_text())
    assert "so it does not beat as many random archs" in page.text


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "front.json").write_text('{"groups": {"front": [')
    with pytest.raises(UserError, match=r"front\.json is not a front"):
        write_report(tmp_path)
    (tmp_path / "front.json").write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]


def test_errors_are_computed_when_the_run_has_none(tmp_path: Path) -> None:
    front = front_content()
    del front["latency_error"]
    data = load_run(write_run(tmp_path, front))
    error = latency_error(data, WORKLOADS[1])
    records = [r for group in front["groups"].values() for r in group]
    pairs = [
        (r["predicted"]["latency_ms"][WORKLOADS[1]], r["measured"]["latency_ms"][WORKLOADS[1]])
        for r in records
    ]
    relative = [abs(p - m) / m for p, m in pairs]
    order = [(p > q) == (m > n) for i, (p, m) in enumerate(pairs) for q, n in pairs[:i]]
    assert error is not None and error.num_networks == len(pairs)
    assert error.mape_percent == pytest.approx(100 * sum(relative) / len(relative))
    assert error.kendall_tau == pytest.approx(2 * sum(order) / len(order) - 1)


def test_comparison_takes_the_fastest_front_member_that_is_as_good(tmp_path: Path) -> None:
    data = load_run(write_run(tmp_path))
    found = comparisons(data, WORKLOADS[0])
    assert [c.plain.loss for c in found] == sorted(n.loss or 0 for n in data.groups["uniform"])
    for item in found:
        assert item.plain.loss is not None and item.better is not None
        reaching = [
            n.latency_ms[WORKLOADS[0]]
            for n in data.groups["front"]
            if n.loss is not None and n.loss <= item.plain.loss
        ]
        assert item.better.latency_ms[WORKLOADS[0]] == min(reaching)
        assert item.speedup == item.plain.latency_ms[WORKLOADS[0]] / min(reaching)


def test_front_table_shows_front_then_uniform_networks() -> None:
    front = front_content()
    console = Console(file=io.StringIO(), width=80)
    console.print(front_table(front))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert "…" not in text
    best, fastest = front["groups"]["front"][-1], front["groups"]["front"][0]
    rows = {
        key: next(line for line in lines if key in line)
        for key in (best["arch_id"], fastest["arch_id"], "softmax d192 L6")
    }
    assert f"{best['measured']['loss']:.3f}" in rows[best["arch_id"]]
    assert "fastest" in rows[fastest["arch_id"]]
    positions = [
        text.index(key) for key in (fastest["arch_id"], best["arch_id"], "softmax d192 L6")
    ]
    assert positions == sorted(positions)


def test_labels_do_not_cover_points_or_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    points = [(float(i), float(i % 3)) for i in range(8)]
    ax.set(xlim=(-1, 8), ylim=(-1, 3))
    labels = {points[0]: "smallest", points[1]: "knee", points[2]: "best, fastest"}
    place_labels(ax, labels, points, [2.5], "black")
    figure.draw_without_rendering()
    texts = [child for child in ax.get_children() if isinstance(child, Annotation)]
    assert sorted(text.get_text() for text in texts) == sorted(labels.values())
    boxes = [text.get_window_extent() for text in texts]
    pixels = [ax.transData.transform(point) for point in points]
    assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(
        ax.get_window_extent().contains(*corner) for box in boxes for corner in box.corners()
    )


def test_number_formats_and_words() -> None:
    assert [number(x) for x in (0.0, 0.00123, 1.0655, 123.4, 12345.6, None, math.inf)] == [
        *("0", "0.00123", "1.07", "123", "12,346"),
        "\u2013",
        "\u2013",
    ]
    assert number(2.4e-7, 2) == "2.4e-07"
    assert fixed(1.23456) == "1.235"
    assert tag("a", "<", tag("b", "&"), title='"') == '<a title="&quot;">&lt;<b>&amp;</b></a>'
    assert workload_words("prefill_b2_t64") == "prefill of 64 tokens, batch 2"
    assert workload_words("decode_b1_t256") == "one token after 256, batch 1"
    assert workload_words("mine") == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_report_in_a_real_browser(
    whole: tuple[Path, str, Page], tmp_path: Path, width: int
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no chromium on this machine to open the report with")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--window-size={width},1400",
    ]
    picture = tmp_path / "report.png"

    def browse(action: str) -> str:
        profile = f"--user-data-dir={tmp_path / action.strip('-').partition('=')[0]}"
        words = [browser, *flags, profile, action, (whole[0] / "report.html").as_uri()]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=90).stdout

    dom = Page(browse("--dump-dom"))
    assert dom.tags.count("svg") == NUM_PICTURES
    assert [i for i in dom.values("id") if i in SECTION_IDS] == list(SECTION_IDS)
    assert "14 networks on the measured front" in dom.text
    browse(f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (1400, width)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100
