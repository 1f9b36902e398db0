"""tdistill: temporal-difference distillation on the teacher's reduced action space."""
