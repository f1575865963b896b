"""A vLLM engine beside the trainer, inside one budget. vLLM itself loads on first use."""

from memplan.runtime.vllm.in_process import InProcess
from memplan.runtime.vllm.protocol import Completion, Engine
from memplan.runtime.vllm.server import Server

__all__ = ["Completion", "Engine", "InProcess", "Server"]
