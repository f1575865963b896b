"""benchmarks/trl_tests.py tells apart what may become of a test of TRL's: tests in their form, one for each verdict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]

UTILITIES = """
import pytest

class TrlTestCase:
    @pytest.fixture(autouse=True)
    def set_tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)
"""
TESTS = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from .testing_utils import TrlTestCase


class TestGRPOTrainer(TrlTestCase):
    def trainer(self, **args):
        return GRPOTrainer(
            model="trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
            reward_funcs="trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5",
            args=GRPOConfig(
                output_dir=self.tmp_dir, per_device_train_batch_size=3, num_generations=3, max_completion_length=8,
                max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, **args
            ),
            train_dataset=load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train"),
        )

    def test_trains(self):
        trainer = self.trainer()
        trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] is not None

    def test_trains_nothing(self):
        self.trainer()

    def test_of_what_is_refused(self):
        self.trainer(torch_compile=True)

    def test_that_minds(self):
        assert not hasattr(self.trainer(), "memplan_passes")

    def test_that_fails(self):
        raise ValueError("anyway")

    def test_of_a_model_of_the_hub(self):
        self.trainer(model_init_kwargs={"name": "Qwen/Qwen2.5-0.5B-Instruct"})
"""


def test_every_verdict(tmp_path):
    place = tmp_path / "trl" / "tests"
    place.mkdir(parents=True)
    (place / "testing_utils.py").write_text(UTILITIES)
    (place / "test_grpo_trainer.py").write_text(TESTS)
    (place / "conftest.py").write_text("raise RuntimeError('no conftest of that folder is to run')")
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "trl_tests.py"),
        "--tests",
        str(place / "test_grpo_trainer.py"),
    ]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]  # of the test that passes unplanned alone
    written = json.loads(out.read_text())
    found = written["found"]
    assert {test: row["verdict"] for test, row in found.items()} == {
        "test_trains": "passes planned",
        "test_trains_nothing": "passes, nothing to plan",
        "test_of_what_is_refused": "refused",
        "test_that_minds": "fails planned",
        "test_that_fails": "unplanned failed",
        "test_of_a_model_of_the_hub": "unplanned skipped",
    }
    assert sum(written["counts"].values()) == len(found)
    planned = found["test_trains"]["planned"]
    assert planned["passes"] == {"with gradients": 1, "without": 0}
    assert planned["plans"] and planned["recomputed"] and planned["budgets"][0] > 10**6
    assert "torch_compile=True" in found["test_of_what_is_refused"]["planned"]["refused"]
    assert "anyway" in found["test_that_fails"]["unplanned"]["reason"]
    assert found["test_of_a_model_of_the_hub"]["unplanned"]["reason"] == "needs Qwen/Qwen2.5-0.5B-Instruct"
