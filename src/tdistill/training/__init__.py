"""Training: stored trajectories → packed micro-batches → statistics → loss, on transformers.Trainer."""

from tdistill.training.arguments import TDistillConfig
from tdistill.training.rollouts import Rollouts, RolloutSettings
from tdistill.training.trainer import TDistillTrainer

__all__ = ["RolloutSettings", "Rollouts", "TDistillConfig", "TDistillTrainer"]
