"""Configurations with one mistake each, and what a user is to read about it."""

from __future__ import annotations

CLIPPING = "- class_path: lightning_optim.GradientClipping"

GOOD = """\
model: {class_path: tests.helpers.BareNet}
data: {class_path: tests.helpers.Data, init_args: {count: 4}}
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_optim.ConfigureOptimizers
      init_args:
        optimizer: adamw
        lr: 3.0e-4
        weight_decay: 0.1
        schedule: cosine
        warmup: 5%
        param_groups:
          - {name: head, pattern: ^head, lr_multiplier: 10}
          - {name: no_decay, max_ndim: 1, weight_decay: 0}
    - class_path: lightning_optim.GradientClipping
      init_args: {max_norm: 1.0}
    - class_path: lightning_optim.DivergenceGuard
      init_args: {patience: 5}
    - lightning_optim.OptimizerMonitor
"""

CHANGES: dict[str, tuple[str, str, str]] = {
    # Values of ConfigureOptimizers.
    "lr below 0": ("lr: 3.0e-4", "lr: -1", "init_args.lr: Invalid lr=-1"),
    "lr of 0": ("lr: 3.0e-4", "lr: 0", "init_args.lr: Invalid lr=0"),
    "lr is NaN": ("lr: 3.0e-4", "lr: .nan", "init_args.lr: Invalid lr=nan"),
    "lr is infinite": ("lr: 3.0e-4", "lr: .inf", "init_args.lr: Invalid lr=inf"),
    "lr is a word": ("lr: 3.0e-4", "lr: small", "init_args.lr: Invalid lr='small'"),
    "lr is a list": ("lr: 3.0e-4", "lr: [0.1]", "init_args.lr: Invalid lr"),
    "lr is a mapping": ("lr: 3.0e-4", "lr: {value: 0.1}", "init_args.lr: Invalid lr"),
    "lr with a unit": ("lr: 3.0e-4", "lr: 3e-4 per step", "init_args.lr: Invalid lr"),
    "weight decay below 0": ("weight_decay: 0.1", "weight_decay: -0.1", "Invalid weight_decay=-0.1"),
    "weight decay is a word": ("weight_decay: 0.1", "weight_decay: none", "weight_decay"),
    "unknown optimizer": ("optimizer: adamw", "optimizer: adamwww", "'adamw'"),
    "optimizer is a number": ("optimizer: adamw", "optimizer: 5", "optimizer"),
    "optimizer is a list": ("optimizer: adamw", "optimizer: [adamw]", "optimizer"),
    "optimizer class does not exist": ("optimizer: adamw", "optimizer: torch.optim.AdamX", "AdamX"),
    "optimizer module does not exist": ("optimizer: adamw", "optimizer: torchh.optim.AdamW", "torchh"),
    "argument the optimizer has not": (
        "optimizer: adamw",
        "optimizer: {class_path: lightning_optim.optim.AdamW, init_args: {beta: 0.9}}",
        "'beta'",
    ),
    "betas of three": ("lr: 3.0e-4", "optimizer_kwargs: {betas: [0.9, 0.95, 0.99]}", "betas"),
    "betas above 1": ("lr: 3.0e-4", "optimizer_kwargs: {betas: [0.9, 1.5]}", "betas"),
    "eps is a word": ("lr: 3.0e-4", "optimizer_kwargs: {eps: tiny}", "eps"),
    "unknown argument of the optimizer": ("lr: 3.0e-4", "optimizer_kwargs: {epsilon: 1.0e-8}", "'epsilon'"),
    "optimizer_kwargs is a list": ("lr: 3.0e-4", "optimizer_kwargs: [betas]", "optimizer_kwargs"),
    "lr twice, in two places": ("weight_decay: 0.1", "optimizer_kwargs: {lr: 0.1}", "lr"),
    "unknown schedule": ("schedule: cosine", "schedule: cosin", "'cosine'"),
    "schedule is a number": ("schedule: cosine", "schedule: 3", "schedule"),
    "argument the schedule has not": (
        "schedule: cosine",
        "schedule: {class_path: lightning_optim.schedules.Cosine, init_args: {fnal: 0.1}}",
        "fnal",
    ),
    "final of a schedule below 0": (
        "schedule: cosine",
        "schedule: {class_path: lightning_optim.schedules.Cosine, init_args: {final: -1}}",
        "final",
    ),
    "warmup is a fraction": ("warmup: 5%", "warmup: 0.05", "'5%'"),
    "warmup is a word": ("warmup: 5%", "warmup: ten", "'ten'"),
    "warmup below 0": ("warmup: 5%", "warmup: -5", "warmup"),
    "warmup of 150 %": ("warmup: 5%", "warmup: 150%", "150%"),
    "warmup is a list": ("warmup: 5%", "warmup: [5]", "warmup"),
    "guard without value": ("model:", "guard:\nmodel:", "has no value"),
    "unknown key of the callback": ("lr: 3.0e-4", "learning_rate: 3.0e-4", "Did you mean 'lr'?"),
    "an argument of the optimizer": ("lr: 3.0e-4", "betas: [0.9, 0.95]", "optimizer_kwargs: {betas"),
    "an optimizer as a mapping of its name": ("optimizer: adamw", "optimizer: {name: adamw}", "class_path"),
    "unknown policy": ("lr: 3.0e-4", "on_resume: restart", "on_resume"),
    "a group without name": ("name: head, pattern: ^head", "pattern: ^head", "name"),
    "a group of two names": ("name: no_decay", "name: head", "head"),
    "unknown key of a group": ("lr_multiplier: 10", "lr_mult: 10", "lr_mult"),
    "a group that matches by nothing": ("name: head, pattern: ^head, lr", "name: head, lr", "head"),
    "multiplier below 0": ("lr_multiplier: 10", "lr_multiplier: -10", "lr_multiplier"),
    "pattern is no expression": ("pattern: ^head", "pattern: '^head('", "^head("),
    "groups are a mapping": (
        "- {name: head, pattern: ^head, lr_multiplier: 10}\n          - {name: no_decay, max_ndim: 1, weight_decay: 0}",
        "head: 10",
        "param_groups",
    ),
    "unknown preset": ("- {name: no_decay, max_ndim: 1, weight_decay: 0}", "- no_deca", "no_deca"),
    "a rule that matches nothing": ("pattern: ^head", "pattern: ^haed", "head.weight"),
    # Values of the other callbacks.
    "limit of 0": ("max_norm: 1.0", "max_norm: 0", "Invalid max_norm=0"),
    "limit below 0": ("max_norm: 1.0", "max_norm: -1", "Invalid max_norm=-1"),
    "limit is a word": ("max_norm: 1.0", "max_norm: much", "max_norm"),
    "unknown method": ("max_norm: 1.0", "method: global", "'global_norm'"),
    "unknown key of clipping": ("max_norm: 1.0", "max_grad_norm: 1.0", "Did you mean 'max_norm'?"),
    "patience of 0": ("patience: 5", "patience: 0", "Invalid patience=0"),
    "patience is a fraction": ("patience: 5", "patience: 2.5", "patience"),
    "patience is a word": ("patience: 5", "patience: much", "patience"),
    "unknown key of the guard": ("patience: 5", "patiense: 5", "Did you mean 'patience'?"),
    "unknown key of spikes": ("patience: 5", "spikes: {treshold: 8}", "treshold"),
    "threshold is a word": ("patience: 5", "spikes: {threshold: high}", "threshold"),
    "unknown detector": ("patience: 5", "detectors: [nan]", "nan"),
    "unknown diagnostic": (
        "- lightning_optim.OptimizerMonitor",
        "- {class_path: lightning_optim.OptimizerMonitor, init_args: {diagnostics: [grad_nrm]}}",
        "'grad_norm'",
    ),
    # Structure.
    "class that does not exist": (
        "lightning_optim.GradientClipping",
        "lightning_optim.GradientClip",
        "GradientClipping",
    ),
    "module that does not exist": (
        "lightning_optim.GradientClipping",
        "lightning_optm.GradientClipping",
        "lightning_optm",
    ),
    "class that is no callback": ("lightning_optim.GradientClipping", "torch.nn.Linear", "no Callback"),
    "function as a callback": ("lightning_optim.OptimizerMonitor", "lightning_optim.attach", "lightning_optim.attach"),
    "arguments beside the class": ("      init_args: {max_norm: 1.0}", "      max_norm: 1.0", "init_args"),
    "class without class_path": (
        CLIPPING,
        "- lightning_optim.GradientClipping:",
        "class_path",
    ),
    "arguments without class": (
        "    - class_path: lightning_optim.GradientClipping\n      init_args",
        "    - init_args",
        "class_path",
    ),
    "init_args are a list": ("init_args: {max_norm: 1.0}", "init_args: [1.0]", "init_args"),
    "init_args are a number": ("init_args: {max_norm: 1.0}", "init_args: 1.0", "init_args"),
    "a callback by a wrong name": ("- lightning_optim.OptimizerMonitor", "- EarlyStoping", "'EarlyStopping'"),
    "a logger that does not exist": (
        "logger: false",
        "logger: {class_path: lightning.pytorch.loggers.CSVLoger}",
        "'CSVLogger'",
    ),
    "unknown argument of a logger": (
        "logger: false",
        "logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_di: x}}",
        "'save_dir'",
    ),
    "a model by its name alone": ("{class_path: tests.helpers.BareNet}", "BareNett", "BareNett"),
    "misspelt init_args": ("init_args: {max_norm", "init_arg: {max_norm", "init_args"),
    "misspelt class_path": (
        CLIPPING,
        "- classpath: lightning_optim.GradientClipping",
        "class_path",
    ),
    "a callback twice": (
        "    - lightning_optim.OptimizerMonitor",
        "    - lightning_optim.GradientClipping",
        "GradientClipping",
    ),
    "clipping by the Trainer as well": ("  accelerator: cpu", "  accelerator: cpu\n  gradient_clip_val: 1.0", "twice"),
    "callbacks are a number": ("callbacks:\n", "callbacks: 3\n  x:\n", "callbacks"),
    "misspelt callbacks": ("  callbacks:", "  callback:", "'callbacks'"),
    "callbacks at the top": ("  callbacks:", "callbacks:", "trainer"),
    "misspelt trainer": ("trainer:", "trainr:", "'trainer'"),
    "max_epochs at the top": ("trainer:\n  max_epochs: 1\n", "max_epochs: 1\ntrainer:\n", "under trainer"),
    "misspelt max_epochs": ("max_epochs: 1", "max_epoch: 1", "'max_epochs'"),
    "max_epochs is a word": ("max_epochs: 1", "max_epochs: many", "trainer.max_epochs"),
    "max_epochs is a list": ("max_epochs: 1", "max_epochs: [1]", "trainer.max_epochs"),
    "unknown accelerator": ("accelerator: cpu", "accelerator: gpux", "gpux"),
    "no model": ("model: {class_path: tests.helpers.BareNet}", "", "model"),
    "model that does not exist": ("tests.helpers.BareNet", "tests.helpers.BareNt", "'BareNet'"),
    "module of the model that does not exist": ("tests.helpers.BareNet", "tests.helprs.BareNet", "tests.helprs"),
    "model that is none": ("tests.helpers.BareNet", "tests.helpers.Data", "no LightningModule"),
    "model is a number": ("{class_path: tests.helpers.BareNet}", "5", "model"),
    "unknown argument of the model": (
        "tests.helpers.BareNet}",
        "tests.helpers.BareNet, init_args: {depth: 3}}",
        "depth",
    ),
    "unknown argument of the data": ("{count: 4}", "{cout: 4}", "'count'"),
    "argument of the data of a wrong type": ("{count: 4}", "{count: many}", "count"),
    "data that does not exist": ("tests.helpers.Data", "tests.helpers.Dat", "Dat"),
    "trainer is a list": ("trainer:\n  max_epochs: 1\n", "trainer: [1]\nx:\n", "trainer"),
    "a command as a key": ("model:", "fit:\n  seed_everything: 1\nmodel:", "fit"),
    "unknown key at the top": ("model:", "modell: 3\nmodel:", "'model'"),
    "a key with a line break": ("model:", "? [a, b]\n: 3\nmodel:", "key"),
    "a key as a flag": ("model:", "--model: 3\nmodel:", "--model"),
    "seed is a word": ("model:", "seed_everything: luck\nmodel:", "seed_everything"),
    # Keys for callbacks beside the list.
    "optim beside the list": ("model:", "optim: {lr: 0.1}\nmodel:", "Two owners"),
    "clip beside the list": ("model:", "clip: {max_norm: 0.1}\nmodel:", "Two owners"),
    "guard beside the list": ("model:", "guard: {}\nmodel:", "Two owners"),
    "unknown key of optim": ("model:", "optim: {learning_rate: 0.1}\nmodel:", "'lr'"),
    "optim is a number": ("model:", "optim: 3\nmodel:", "optim"),
    "optim is a list": ("model:", "optim: [adamw]\nmodel:", "optim"),
    "misspelt clip": ("model:", "clipp: {max_norm: 1}\nmodel:", "'clip'"),
    # YAML.
    "a key twice": ("max_epochs: 1", "max_epochs: 1\n  max_epochs: 2", "occurs twice"),
    "an argument twice": ("lr: 3.0e-4", "lr: 3.0e-4\n        lr: 3.0e-3", "occurs twice"),
    "a section twice": ("model:", "trainer: {max_epochs: 3}\nmodel:", "occurs twice"),
    "a tab": ("  max_epochs: 1", "\tmax_epochs: 1", "line 4"),
    "an open brace": ("{max_norm: 1.0}", "{max_norm: 1.0", "line"),
    "an open quote": ("optimizer: adamw", 'optimizer: "adamw', "line"),
    "wrong indentation": ("        lr: 3.0e-4", "       lr: 3.0e-4", "line"),
    "no space after a colon": ("optimizer: adamw", "optimizer:adamw", "line 13"),
    "an unknown tag": ("lr: 3.0e-4", "lr: !float 3.0e-4", "!float"),
    "an object of Python": ("lr: 3.0e-4", "lr: !!python/object/apply:os.getcwd []", "python"),
    "an unknown anchor": ("lr: 3.0e-4", "lr: *rate", "rate"),
    "two documents": ("trainer:", "---\ntrainer:", "document"),
    "a percent sign at the start": ("warmup: 5%", "warmup: %5", "line"),
    "an at sign": ("optimizer: adamw", "optimizer: @adamw", "line"),
}
"""Name of each mistake: what it replaces in `GOOD`, by what, and a part of the message."""

WHOLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "only a comment": (b"# nothing\n", "is empty"),
    "null": (b"null\n", "is empty"),
    "a list": (b"- 1\n- 2\n", "a list"),
    "a word": (b"hello\n", "mapping"),
    "a number": (b"42\n", "mapping"),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-8"),
    "Latin-1": (GOOD.replace("adamw", "\xe9").encode("latin-1"), "UTF-8"),
    "binary": (bytes(range(256)), "UTF-8"),
    "a NUL": (GOOD.replace("adamw", "a\0b").encode(), "character #x0000"),
    "JSON cut off": (b'{"trainer": {"max_epochs": 1', "line"),
    "Python": (b"trainer = dict(max_epochs=1)\n", "mapping"),
    "a list that contains itself": (b"trainer: &a [*a]\n", "trainer"),
    "a date that is none": (b"trainer: 2026-13-45\n", "month"),
}
"""Name of each mistake: a whole file, and a part of the message."""
