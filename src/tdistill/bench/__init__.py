"""What a step, a process, a store and a capture cost, beside what else one would run; one measurement a module."""
