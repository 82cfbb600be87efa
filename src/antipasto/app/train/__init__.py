"""`antipasto train`: options (`config`) → TRL's (`trl_args`), the monitor or the router (`method`) → one run (`run`)."""
