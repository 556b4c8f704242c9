"""A peer as a row: the same weights and tokens go in, and what it leaves is measured or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab import peer_run, pipeline
from quantlab.conditions import read_calibration
from quantlab.errors import ConfigError, MethodError
from quantlab.export import checkpoint
from quantlab.methods import METHODS, configure, parse_variant, parse_variants
from quantlab.metrics.quality import Head, Reference
from quantlab.models import load
from quantlab.peers import environments
from quantlab.peers.process import Report
from quantlab.plots import fragments
from quantlab.plots.words import words
from quantlab.prepared import Prepared
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import Event, Progress, RunSpec
from tests.fake_peer import REPORT, install
from tests.test_foreign import SMALL, written
from tests.tiny import (
    CONTEXT,
    FAMILIES,
    VOCABULARY,
    logits,
    randomize,
    saved,
    tiny,
    token_ids,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("exact", "home")

RECIPE = """
import json, shutil

def check():
    {check}

def quantize(job, clock):
    print("what a peer says by the way")
    job.step("quantize", 1, 2)
    asked = dict(ids=job.pieces, options=job.options, threads=job.threads)
    open({asked!r}, "w").write(json.dumps(asked))
    shutil.copytree({made!r}, job.checkpoint)
    return {{
        "peer": "Fake", "version": "1.5", "settings": "its defaults", "seconds": 12.5,
        "load_seconds": 1.0, "save_seconds": 2.0, "patch": {patch!r},
    }}
"""


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return saved(tmp_path / "original", tied=True)


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Environments of GPTQModel and AutoAWQ whose recipes are still to be written."""
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "peers")
    monkeypatch.setattr(environments, "WORKERS", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    for name in ("gptqmodel", "autoawq"):
        install(peer_of(name), "1.5")
    return tmp_path


def peer_of(name: str) -> environments.Peer:
    peer = METHODS[name].peer
    assert peer is not None
    return peer


def recipe(
    folder: Path, name: str, made: Path, *, check: str = "pass", patch: str | None = None
) -> Path:
    """Let the peer leave a copy of `made`; returns the file where it says what it was asked."""
    asked = folder / f"{name}.json"
    text = RECIPE.format(check=check, asked=str(asked), made=str(made), patch=patch)
    peer_of(name).worker.write_text(text)
    return asked


def spec_of(model: Path, names: str, **more: Any) -> RunSpec:
    settings: dict[str, Any] = SMALL | {"threads": 1} | more
    return RunSpec(model=str(model), variants=parse_variants(names), **settings)


def test_a_peer_is_a_row_like_any_other(original: Path, peers: Path) -> None:
    """Its checkpoint measures as the same folder does by name; the second time it is at hand, and
    for another release of the peer it is not."""
    made = written(original, "rtn:4:symmetric=true", "gptq")
    asked = recipe(peers, "gptqmodel", made, patch="a copy")
    spec = spec_of(original, f"bf16,gptqmodel:4:act_order=true,checkpoint:{made},gptq:4")
    events: list[Event] = []
    store = Store()
    records = pipeline.compare(spec, store=store, emit=events.append)
    assert [r.status for r in records] == ["finished"] * 4, [r.error for r in records]
    _, row, by_name, _ = records
    for field in ("perplexity", "kl_divergence", "segments", "size_bytes", "bits_per_weight"):
        assert getattr(row, field) == getattr(by_name, field), field
    assert row.execution == "packed"
    assert (row.bits, row.quantize_seconds) == (4, 12.5)
    assert row.fallbacks == ("Fake 1.5 is patched: a copy", *by_name.fallbacks)
    assert row.details["checkpoint"] == by_name.details["checkpoint"]
    assert row.details["peer"]["version"] == "1.5"
    assert row.details["peer"]["patch"] == "a copy"
    assert row.details["peer"]["versions"]["torch"] == torch.__version__
    assert row.environment["calibration"] == records[3].environment["calibration"]
    shown = {name: value for name, value, _ in fragments.details(row, words("en"))}
    assert shown["Made by"] == "Fake 1.5 (its defaults)"

    given = json.loads(asked.read_text())
    ids = read_calibration(load(str(original)), spec, events.append).ids
    assert given["ids"] == ids.tolist()
    assert given["options"] == configure(spec.variants[1], 32).to_json()
    assert given["options"] | {"act_order": True, "group_size": 32, "bits": 4} == given["options"]
    assert given["threads"] == 1
    stages = [(e.stage, e.done, e.total) for e in events if isinstance(e, Progress)]
    assert ("quantize", 1, 2) in stages

    assert row.artifact is not None
    folder = store.artifact(row.artifact)
    assert sorted(file.name for file in folder.iterdir()) == ["about.json", "weights"]
    asked.unlink()
    one = spec_of(original, "gptqmodel:4:act_order=true")
    assert pipeline.compare(one, store=store)[0].cached
    other = spec_of(original, "gptqmodel:4:act_order=true", eval_tokens=64)
    again = pipeline.compare(other, store=store)[0]
    assert (again.artifact, again.quantize_seconds, again.cached) == (row.artifact, 12.5, False)
    assert again.details == row.details
    assert not asked.exists(), "the artifact was at hand"
    about = next(peer_of("gptqmodel").python.parents[1].rglob("METADATA"))
    about.write_text(about.read_text().replace("1.5", "1.6"))
    assert METHODS["gptqmodel"].content(None) == "gptqmodel 1.6"


def test_what_cannot_run_is_a_row_with_its_reason(original: Path, peers: Path) -> None:
    recipe(peers, "gptqmodel", original, check="import no_such_package")
    recipe(peers, "autoawq", original, check="raise SystemExit('it will not')")
    records = pipeline.compare(spec_of(original, "bf16,gptqmodel:4,autoawq:4,autogptq:4,rtn:4"))
    statuses = [record.status for record in records]
    assert statuses == ["finished", "failed", "failed", "failed", "finished"]
    missing, refused, cuda = records[1:4]
    assert missing.error == "GPTQModel failed: No module named 'no_such_package'"
    assert "make peers" in str(missing.hint)
    assert (refused.error, refused.hint) == ("AutoAWQ failed: it will not", None)
    if not torch.cuda.is_available():
        assert "CUDA only" in str(cuda.error)
        assert "gptqmodel:4" in str(cuda.hint)
    artifacts = Store().root / "artifacts"
    assert len(list(artifacts.iterdir())) == 1, "nothing is left of what failed"


def test_a_broken_checkpoint_is_the_peers_failure(original: Path, peers: Path) -> None:
    made = written(original, "rtn:4", "gptq")
    file = made / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 200
    save_file(weights, file, metadata={"format": "pt"})
    recipe(peers, "gptqmodel", made)
    row, by_name = pipeline.compare(spec_of(original, f"gptqmodel:4,checkpoint:{made}"))
    assert by_name.status == "finished"
    assert by_name.perplexity is not None
    assert row.status == "failed"
    assert row.perplexity is None
    assert f"its perplexity is {by_name.perplexity:,.0f}, the original's" in str(row.error)
    assert "Fake 1.5 wrote a broken checkpoint" in str(row.error)


def test_a_folder_that_is_no_checkpoint_is_refused(original: Path, peers: Path) -> None:
    recipe(peers, "gptqmodel", original)
    row = pipeline.compare(spec_of(original, "gptqmodel:4"))[0]
    assert row.status == "failed"
    assert "checkpoint is not quantized" in str(row.error)


# --- the pieces ------------------------------------------------------------------------------


def reference(original: float, vocabulary: int) -> tuple[Reference, list[torch.Tensor]]:
    """An original of this perplexity: the next token has probability 1 / original everywhere, the
    others share the rest."""
    head = torch.nn.Linear(1, vocabulary, bias=False)
    rest = (1 - 1 / original) / (vocabulary - 1)
    with torch.no_grad():
        head.weight.fill_(math.log(rest))
        head.weight[0] = math.log(1 / original)
    holder = Head.__new__(Head)
    holder.linear, holder.softcap, holder.scale = head, None, None
    return Reference(torch.ones(2, 200, 1), holder), [torch.zeros(200, dtype=torch.long)] * 2


@pytest.mark.parametrize(
    ("original", "vocabulary", "fine", "broken"),
    [
        (25.0, 10_000, 499, 501),  # sqrt(25 * 10,000)
        (400.0, 10_000, 3999, 4001),  # ten times the original
        (2.0, 100, 19, 21),
    ],
)
def test_where_a_peer_has_lost_the_model(
    original: float, vocabulary: int, fine: float, broken: float
) -> None:
    states, windows = reference(original, vocabulary)
    assert states.vocabulary == vocabulary
    assert states.perplexity(windows) == pytest.approx(original, rel=1e-4)
    prepared = Prepared("checkpoint", Path(), 0, 0, details={"peer": REPORT})
    peer_run.check_result(prepared, fine, states, windows)
    with pytest.raises(
        MethodError, match=f"perplexity is {broken:,}, the original's {original:,.2f}"
    ):
        peer_run.check_result(prepared, broken, states, windows)
    peer_run.check_result(Prepared("quantlab", Path(), 0, 0), 1e9, states, windows)
    peer_run.check_result(prepared, 1e9, None, windows)


@pytest.mark.parametrize(("told", "fits"), [(3.0005, True), (3.01, False), (math.nan, False)])
def test_another_model_is_noticed(told: float, fits: bool) -> None:
    report = Report(**REPORT | {"original_loss": told})  # type: ignore[arg-type]
    if fits:
        peer_run.check_start(report, 3.0)
        return
    with pytest.raises(MethodError, match=r"Fake 1\.5 reads another model.* instead of 3\.000"):
        peer_run.check_start(report, 3.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_for_peers_is_the_original(name: str, tmp_path: Path) -> None:
    """Exactly, in every family, and without losing what releases of transformers before 5 read."""
    model, ids = tiny(name), token_ids(1, 20)
    checkpoint.write_original(tmp_path / "model", model)
    again = load(str(tmp_path / "model"))
    assert torch.equal(logits(again.module, ids), logits(model.module, ids))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert "quantization_config" not in config
    if "rope_theta" in (config.get("rope_parameters") or {}):
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_a_peer_is_not_written_by_quantlab(original: Path, tmp_path: Path) -> None:
    spec = spec_of(original, "gptqmodel:4")
    for format in ("quantlab", "gptq"):
        with pytest.raises(ConfigError, match="measured by compare only; gptq is written"):
            pipeline.quantize(spec, parse_variant("gptqmodel:4"), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_the_time_of_peers_is_foreseen() -> None:
    """As they say of themselves, for the bundled model; QuantLab's own steps are not counted."""

    def seconds(name: str) -> float:
        return pipeline.estimate(RunSpec(variants=parse_variants(name))).seconds

    for name, method in METHODS.items():
        if method.peer is not None:
            assert method.peer_seconds > 0
            assert seconds(name) - seconds("rtn:4") == pytest.approx(method.peer_seconds, rel=0.01)


def test_records_of_peers_survive_json() -> None:
    row = ResultRecord("gptqmodel:4", "gptqmodel", 4, {}, "finished", details={"peer": REPORT})
    assert ResultRecord.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.peer is not None])
def test_the_real_peers(name: str, tmp_path: Path) -> None:
    """Where `make peers` has installed them. Rounding to 4 bits by any method keeps the tiny model
    nearer to the original than plain rounding to 3 bits does. (AutoAWQ takes rows by 64 only.)"""
    peer, original = peer_of(name), tmp_path / "original"
    if peer.absence() or (peer.gpu_only and not torch.cuda.is_available()):
        pytest.skip(peer.absence() or peer.gpu_only)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    module = LlamaForCausalLM(config)
    randomize(module, 0)
    module.save_pretrained(original)
    tokenizer().save_pretrained(original)
    row, rough = pipeline.compare(spec_of(original, f"{name}:4,rtn:3"))
    assert row.status == "finished", row.error
    assert row.kl_divergence is not None
    assert rough.kl_divergence is not None
    assert 0 < row.kl_divergence < rough.kl_divergence
    assert row.details["peer"]["version"] == peer.version()
    assert ("patched" in " ".join(row.fallbacks)) == (name == "autoawq")
    assert row.quantize_seconds is not None
    assert row.peak_rss_bytes is not None
    assert row.details["checkpoint"]["format"] in (name, METHODS[name].peer.twin)  # type: ignore[union-attr]
