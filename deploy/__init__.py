"""HOW IT ANSWERS: bundle, predictor, registry, server. No torch, no Prefect, no DVC, nothing from tasks or flows."""
