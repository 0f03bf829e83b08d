"""The sweep behind ``sparse-attn bench quality``: with a made-up model, and in few steps with the real one."""

from types import SimpleNamespace

import pytest
import torch

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import metrics, sweep
from sparse_compile.evaluation import reference as reference_module
from sparse_compile.evaluation.demo_model import VideoSize
from sparse_compile.evaluation.grids import at_density, configuration
from sparse_compile.evaluation.protocol import Protocol
from sparse_compile.evaluation.reference import Reference, dense_reference
from sparse_compile.evaluation.results import ResultsFile
from sparse_compile.evaluation.sweep import interpolated_root, match_density, run_sweep

PROTOCOL = Protocol(size=VideoSize(2, 8, 8), videos=2, seeds=(0, 1, 2), steps=3)
HALF, QUARTER = at_density("svg2", 0.5), at_density("adaspa", 0.25)


def silent(label, generations):
    return None


class FakeModel:
    """Stands for pipeline, backend and report: the fewer pairs are kept, the further the videos are from dense."""

    def __init__(self):
        self.compiled = []
        self.seeds = []
        self.late_compilations = 0

    def compiled_pipeline(self, options):
        self.compiled.append(options)
        kept = options.get("density", options.get("top_p", 1 - options.get("sparsity", 0.0)))
        return SimpleNamespace(density=kept, generations=0)

    def generate(self, protocol, pipeline, seed, on_step=None):
        self.seeds.append(seed)
        pipeline.generations += 1
        for step in range(protocol.steps if on_step else 0):
            on_step(step)
        return (dense(seed) + 0.1 * (1 - pipeline.density) / (seed + 1)).clamp(0, 1)

    def explain(self, pipeline):
        phases = ["dense", "search", "search", "sparse", "refine"]
        kept = SimpleNamespace(
            density=pipeline.density,
            density_run=(4 + pipeline.density) / 5,
            kept_mass=None,
            at_floor=0.25,
            at_ceiling=0.0,
            steps=[
                SimpleNamespace(step=step, phase=phase) for step, phase in zip((0, 1, 1, 2, 3), phases, strict=True)
            ],
        )
        late = self.late_compilations * (pipeline.generations - 1)
        return SimpleNamespace(
            density=pipeline.density,
            generations=[kept] * pipeline.generations,
            compilations=3 + late,
            warnings=["nearly uniform"],
        )


def dense(seed):
    return torch.full((2, 3, *PROTOCOL.size), 0.1 * (seed + 1))


def measure(videos, reference):
    return [{"psnr": value, "ssim": 0.9, "flicker_gap": 0.1} for value in metrics.psnr(videos, reference).tolist()]


REFERENCE = Reference(*[torch.cat([dense(seed) for seed in PROTOCOL.seeds])] * 2)


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    monkeypatch.setattr(sweep, "compiled_pipeline", fake.compiled_pipeline)
    monkeypatch.setattr(sweep, "explain", fake.explain)
    monkeypatch.setattr(sweep, "measure", measure)  # SSIM needs larger frames
    monkeypatch.setattr(Protocol, "generate", lambda *given: fake.generate(*given))
    return fake


@pytest.fixture
def results(tmp_path):
    return ResultsFile(tmp_path / "results.jsonl")


def run(results, configurations, protocol=PROTOCOL, started=silent):
    run_sweep(protocol, configurations, REFERENCE, results, started, "mine")
    return results.rows()


def test_a_configuration_is_compiled_once_and_generates_each_seed_as_a_batch(model, results):
    steps = []
    run(results, [HALF], started=lambda label, generations: lambda step: steps.append((label, generations)))
    assert len(model.compiled) == 1 and model.seeds == [0, 1, 2]
    assert steps == [(HALF.label, 3)] * 9


def test_a_row_has_figures_over_all_videos_and_the_whole_context(model, results):
    [row] = run(results, [HALF])
    assert row["psnr_each"] == pytest.approx([26.02, 26.02, 32.04, 32.04, 35.56, 35.56], abs=0.01)
    assert row["psnr_by_seed"] == pytest.approx([26.02, 32.04, 35.56], abs=0.01)
    assert row["psnr"] == pytest.approx(31.21, abs=0.01) and row["psnr_min"] == pytest.approx(26.02, abs=0.01)
    assert (row["density"], row["density_run"], row["kept_mass"]) == (0.5, 0.9, None)
    assert (row["at_floor"], row["at_ceiling"], row["searches"]) == (0.25, 0.0, 2)
    assert (row["compilations"], row["recompilations"], row["lossless"]) == (3, 0, False)
    assert (row["label"], row["grid"], row["method"], row["correction"]) == (HALF.label, "mine", "svg2", "coupled")
    assert (row["size"], row["tokens"], row["seeds"], row["videos"]) == ("2x8x8", 8, [0, 1, 2], 2)
    assert (row["dense_steps"], row["dense_layers"], row["ceiling"]) == (0.2, 0, 120)
    assert row["options"]["density"] == 0.5 and row["options"]["k_clusters"] == 72
    assert row["warnings"] == ["nearly uniform"]
    assert {"revision", "torch", "threads", "dtype", "steps", "guidance", "seconds", "cpu_seconds", "compile"} <= set(
        row
    )


def test_what_has_a_row_is_not_measured_again(model, results):
    run(results, [HALF])
    rows = run(results, [HALF, QUARTER])
    assert [row["label"] for row in rows] == [HALF.label, QUARTER.label]
    assert [options["method"] for options in model.compiled] == ["svg2", "adaspa"]


def test_rows_of_another_protocol_do_not_count(model, results):
    run(results, [HALF])
    rows = run(results, [HALF], protocol=Protocol(size=PROTOCOL.size, videos=2, seeds=(0, 1, 2), steps=4))
    assert len(rows) == 2 and rows[0]["key"] != rows[1]["key"]


def test_what_was_measured_before_an_interruption_is_kept(model, results, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    run(results, [HALF])
    monkeypatch.setattr(sweep, "compiled_pipeline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(results, [HALF, QUARTER])
    assert [row["label"] for row in results.rows()] == [HALF.label]


def test_compilations_after_the_first_generation_are_counted(model, results):
    model.late_compilations = 1
    [row] = run(results, [HALF])
    assert (row["compilations"], row["recompilations"]) == (5, 2)


def test_everything_kept_is_lossless(model, results):
    [row] = run(results, [at_density("svg2", 1.0)])
    assert row["lossless"] and row["psnr"] == 120


def test_a_refused_configuration_is_named_before_anything_is_generated(model, results):
    wrong = configuration("svg2", {"densty": 0.5})
    with pytest.raises(SparseAttentionError, match=r"got 'svg2 coupled densty=0.5'.*Did you mean 'density'"):
        run(results, [HALF, wrong])
    assert not model.compiled and not results.rows()


def test_a_top_p_is_searched_on_one_seed_and_then_measured_on_all(model, results):
    wanted = configuration("svg2", {}, correction="none", matched_density=0.37)
    [row] = run(results, [wanted])
    assert row["density"] == pytest.approx(0.37, abs=0.003)
    assert row["options"]["top_p"] == pytest.approx(row["density"])
    probes = len(model.compiled) - 1
    assert model.seeds == [0] * probes + [0, 1, 2] and probes <= 3
    assert len(run(results, [wanted])) == 1


def test_a_density_out_of_reach_is_an_error(model, monkeypatch):
    def keeps_at_least_half(options):
        return SimpleNamespace(density=max(0.5, options["top_p"]), generations=0)

    monkeypatch.setattr(sweep, "compiled_pipeline", keeps_at_least_half)
    with pytest.raises(SparseAttentionError, match=r"about 0.2 of the pairs.*got '0.500 at top_p=.*lower min_kept"):
        match_density(PROTOCOL, configuration("svg2", {}, matched_density=0.2), silent)


@pytest.mark.parametrize("function", [lambda x: x**4, lambda x: x**0.5, lambda x: max(0.1, x)])
@pytest.mark.parametrize("wanted", [0.15, 0.25, 0.9])
def test_a_rising_function_meets_a_value_within_few_probes(function, wanted):
    found = interpolated_root(function, wanted, tolerance=0.003, most=8)
    assert found.value == function(found.at) == pytest.approx(wanted, abs=0.01)


def test_the_dense_videos_are_made_once_for_a_protocol(monkeypatch, tmp_path):
    compiled, generated = [], []

    def generate(protocol, pipeline, seed, on_step=None):
        generated.append(seed)
        return dense(seed) + 0.001 * len(compiled)

    monkeypatch.setattr(reference_module, "load_pipeline", lambda: None)
    monkeypatch.setattr(reference_module, "compile_transformer", lambda _, backend: compiled.append(backend))
    monkeypatch.setattr(Protocol, "generate", generate)
    first, second = (dense_reference(PROTOCOL, tmp_path / "out", silent) for _ in range(2))
    assert compiled == ["inductor"] and generated == [0, 1, 2] * 2
    assert torch.equal(first.compiled, second.compiled) and torch.equal(first.eager, second.eager)
    assert second.ceiling == pytest.approx(60, abs=0.01)
    dense_reference(Protocol(size=PROTOCOL.size, videos=2, seeds=(0,)), tmp_path / "out", silent)
    assert generated == [*[0, 1, 2] * 2, 0, 0]
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.slow
def test_the_real_model_is_dense_where_everything_is_kept_and_close_where_little_is(results):
    protocol = Protocol(videos=2, seeds=(0, 1), steps=3)
    videos = torch.cat([protocol.generate(reference_module.load_pipeline(), seed) for seed in protocol.seeds])
    reference = Reference(videos, videos)
    configurations = [
        configuration("svg2", {"density": 1.0}, changes={"dense_steps": 0.4}),
        configuration("adaspa", {"sparsity": 0.9}, correction="none", changes={"dense_steps": 0.4}),
    ]
    try:
        run_sweep(protocol, configurations, reference, results, silent, "real")
    finally:
        torch.compiler.reset()
    whole, rough = results.rows()
    assert whole["psnr"] > 80 and whole["density"] == pytest.approx(1.0)
    assert rough["psnr"] < 60 and rough["density"] == pytest.approx(0.1, abs=0.02)
    assert 0 < rough["kept_mass"] < 0.9 < whole["kept_mass"] <= 1
    assert whole["recompilations"] == rough["recompilations"] == 0
