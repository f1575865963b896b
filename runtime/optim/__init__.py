"""Optimizers whose states take less."""

from memplan.runtime.optim.hybrid_adamw import HybridAdamW as HybridAdamW
