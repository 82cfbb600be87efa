"""`antipasto train`: options (`config`) → TRL's (`trl_args`), what the gate goes by (`gating`) → one run (`run`)."""
