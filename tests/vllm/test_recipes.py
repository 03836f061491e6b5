"""The recipes, cut down to a few steps, against the real server: what they sample comes from the newest weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import tenants
from recipes.config import RecipeConfig
from recipes.grpo_lightning import train
from recipes.history import StepRecord
from recipes.policy import load_policy, save_policy, warm_up
from recipes.tenants_report import TenantsReport
from tests.distributed.launch import run_ranks
from tests.vllm.conftest import Server
from tests.vllm.engines import server_version

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "grpo_smoke.yaml"
TENANTS_SMOKE = ROOT / "configs" / "tenants_smoke.yaml"
STEPS = 3
SAME = 1e-4  # float32 on both sides, other kernels

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")


@pytest.fixture(scope="module")
def policy_dir(vllm_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's own model, warmed up: when nothing is right, there is nothing to learn from."""
    folder = tmp_path_factory.mktemp("warm")
    smoke = RecipeConfig.load(SMOKE)
    policy = load_policy(vllm_server.policy_dir)
    warm_up(policy, smoke.seed, smoke.model, smoke.data.max_operand)
    save_policy(policy, folder)
    return folder


def overrides(server: Server, policy_dir: Path, output: Path) -> list[str]:
    return [
        f"steps={STEPS}",
        f"output_dir={output}",
        f"model.path={policy_dir}",
        f"sync.rollouts={server.url}",
        "trainer.accelerator=cpu",
    ]


def records(output: Path) -> list[StepRecord]:
    return [StepRecord.model_validate_json(line) for line in (output / "steps.jsonl").read_text().splitlines()]


def assert_on_policy(seen: list[StepRecord]) -> None:
    assert [record.step for record in seen] == list(range(STEPS + 1))
    assert [record.server_version for record in seen] == [str(step) for step in range(STEPS + 1)]
    assert all(record.logprob_gap < SAME for record in seen)
    assert 0 < seen[0].reward < 1  # else no step would change anything
    assert all(record.sync_s and record.sync_bytes for record in seen)


def test_lightning_samples_from_the_newest_weights(vllm_server: Server, policy_dir: Path, tmp_path: Path) -> None:
    train(RecipeConfig.load(SMOKE, overrides(vllm_server, policy_dir, tmp_path)))
    assert_on_policy(records(tmp_path))
    assert server_version(vllm_server.url) == str(STEPS)


def test_lightning_control_falls_behind_the_trainer(vllm_server: Server, policy_dir: Path, tmp_path: Path) -> None:
    train(RecipeConfig.load(SMOKE, overrides(vllm_server, policy_dir, tmp_path)).without_sync())
    first, *later = records(tmp_path)
    assert first.logprob_gap < SAME < 0.01 < later[-1].logprob_gap
    assert [record.server_version for record in (first, *later)] == ["0"] * (STEPS + 1)
    assert [record.sync_s is None for record in (first, *later)] == [False, True, True, True]


def test_accelerate_recipe_runs_in_two_processes(vllm_server: Server, policy_dir: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(SMOKE), *overrides(vllm_server, policy_dir, tmp_path)]
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nfrom recipes.grpo_accelerate import main\nsys.exit(main({arguments!r}))\n")
    lead, follower = run_ranks(script, 2, timeout_s=180.0, env={"ACCELERATE_USE_CPU": "true"})
    assert_on_policy(records(tmp_path))
    assert "4 weight versions seen on the server" in lead
    assert "reward" not in follower


@pytest.mark.slow
def test_two_tenants_train_at_the_same_time_and_leave_the_base_alone(tmp_path: Path) -> None:
    code = tenants.main(["--config", str(TENANTS_SMOKE), f"output_dir={tmp_path}", f"model.path={tmp_path / 'base'}"])
    report = TenantsReport.model_validate_json((tmp_path / "report.json").read_text())
    assert all("the reward rose by" in failure for failure in report.failures)  # too few steps for that to be sure
    assert code == bool(report.failures)
    assert report.base_is_untouched
    for tenant in report.tenants.values():
        assert [record.server_version for record in tenant.records] == [str(step) for step in range(tenant.steps + 1)]
        assert tenant.logprob_gap_max < SAME
    assert (tmp_path / "report.png").exists()
