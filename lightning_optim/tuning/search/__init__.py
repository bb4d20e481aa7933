"""A search for hyperparameters: Optuna's samplers, pruners and storages over fits in processes of their own."""
