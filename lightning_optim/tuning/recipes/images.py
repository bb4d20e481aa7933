"""Recipes for images: transformers and convolutional networks from scratch, fine-tuned, frozen; segmentation."""

from __future__ import annotations

from lightning_optim.tuning.recipes.base import Batch, Recipe

_GOYAL = "Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677"
_TRICKS = "He et al., Bag of Tricks for Image Classification, 2018, https://arxiv.org/abs/1812.01187"
_MICIKEVICIUS = "Micikevicius et al., Mixed Precision Training, 2017, https://arxiv.org/abs/1710.03740"
_BF16 = "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, https://arxiv.org/abs/1905.12322"

VIT = Recipe(
    name="vit",
    description="vision transformers from scratch (ViT, DeiT)",
    sources={
        "deit": "Touvron et al., Training data-efficient image transformers (DeiT), 2020, "
        "https://arxiv.org/abs/2012.12877",
        "steiner": "Steiner et al., How to train your ViT?, 2021, https://arxiv.org/abs/2106.10270",
        "bf16": _BF16,
    },
    batch=Batch(1024, "deit", "images", "linear"),
    advice=(
        "Name positions and tokens that are plain parameters in the model's no_weight_decay(), as timm does.",
        "With much data and little augmentation: weight_decay 0.03 to 0.1, warmup of 10,000 steps [steiner].",
        "The loss has label smoothing 0.1, the data augmentation, the model stochastic depth 0.1 [deit, table 9].",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 300  # [deit] table 9
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: adamw
  lr: 1.0e-3  # [deit] table 9: 0.0005 x batch / 512; [steiner] the same at 4,096
  weight_decay: 0.05  # [deit] table 9
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [steiner] section 3
  schedule: cosine
  warmup: 1.67%  # [deit] table 9: 5 of 300 epochs
  param_groups: [no_decay]
clip:
  max_norm: 1.0  # [steiner] section 3; [deit] has none
guard: {}
monitor: {}
""",
)

RESNET = Recipe(
    name="resnet",
    description="convolutional networks with BatchNorm from scratch (ResNet, VGG, RegNet)",
    sources={
        "goyal": _GOYAL,
        "resnet": "He et al., Deep Residual Learning, 2015, https://arxiv.org/abs/1512.03385",
        "tricks": _TRICKS,
        "bf16": _BF16,
    },
    batch=Batch(256, "goyal", "images", "linear"),
    advice=(
        "Above 8,192 images per step the linear rule ends [goyal]; optimizer: lars or lamb goes on.",
        "Without BatchNorm, or with few images per device: clip: {method: agc}, or the recipe convnext.",
        "In steps, as [resnet] and [goyal]: schedule: multi_step with milestones 33.3%, 66.7%, 88.9% for 90 epochs.",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 120  # [tricks] section 2.1; [goyal] 90
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: sgd
  lr: 0.1  # [resnet] section 3.4, for 256 images; [goyal] 0.1 x batch / 256
  weight_decay: 1.0e-4  # [resnet] section 3.4; [goyal]
  optimizer_kwargs:
    momentum: 0.9  # [resnet] section 3.4; [goyal]
    nesterov: true  # [goyal] section 5.1
  schedule: cosine  # [tricks] section 5.1
  warmup: 4%  # [tricks] section 3.1: 5 of 120 epochs; [goyal] 5 of 90
  param_groups: [no_decay]  # [goyal] section 5.1: none on BatchNorm; [tricks] nor on biases
guard: {}
monitor: {}
""",
)

CONVNEXT = Recipe(
    name="convnext",
    description="modern convolutional networks from scratch: depthwise kernels, LayerNorm (ConvNeXt)",
    sources={
        "convnext": "Liu et al., A ConvNet for the 2020s (ConvNeXt), 2022, https://arxiv.org/abs/2201.03545",
        "malladi": "Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022, "
        "https://arxiv.org/abs/2205.10382",
        "bf16": _BF16,
    },
    batch=Batch(4096, "convnext", "images", "sqrt", "malladi"),
    advice=(
        "An average of the weights with decay 0.9999 [convnext, table 5]: add lightning.pytorch.callbacks."
        "EMAWeightAveraging to trainer.callbacks; runs below 50,000 steps want a lower one.",
        "The loss has label smoothing 0.1, the model stochastic depth 0.1 to 0.5 by size [convnext, table 5].",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 300  # [convnext] table 5
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: adamw
  lr: 4.0e-3  # [convnext] table 5, for 4,096 images
  weight_decay: 0.05  # [convnext] table 5
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [convnext] table 5
  schedule: cosine
  warmup: 6.67%  # [convnext] table 5: 20 of 300 epochs
  param_groups: [no_decay]
guard: {}
monitor: {}
""",
)

VISION_FINETUNE = Recipe(
    name="vision-finetune",
    description="fine-tuning of all weights of a pretrained image model",
    sources={
        "bit": "Kolesnikov et al., Big Transfer (BiT), 2019, https://arxiv.org/abs/1912.11370, and its hyper-rule",
    },
    batch=Batch(512, "bit", "images"),
    advice=(
        "Length [bit]: 500 steps below 20,000 images, 10,000 below 500,000, else 20,000.",
        "Transformers of hundreds of millions of parameters: the recipe bert-finetune, with its layer_decay.",
    ),
    settings_yaml="""\
trainer:
  max_steps: 10000  # [bit] for 20,000 to 500,000 images
optim:
  optimizer: sgd
  lr: 0.003  # [bit] section 3.3
  weight_decay: 0.0  # [bit] none in transfer
  optimizer_kwargs:
    momentum: 0.9  # [bit] section 3.3
  schedule:
    class_path: lightning_optim.schedules.MultiStepDecay
    init_args:
      warmup: 5%  # [bit] 500 of 10,000 steps
      milestones: [30%, 60%, 90%]  # [bit] section 3.3
      factor: 0.1  # [bit] section 3.3
guard: {}
monitor: {}
""",
)

LINEAR_PROBE = Recipe(
    name="linear-probe",
    description="a new head on a frozen pretrained model",
    sources={
        "dino": "Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), 2021, "
        "https://arxiv.org/abs/2104.14294, and its eval_linear.py",
    },
    batch=Batch(256, "dino", "images", "linear"),
    advice=("The best rate depends on the scale of the features; [dino] recommends to search it for each model.",),
    settings_yaml="""\
trainer:
  max_epochs: 100  # [dino] eval_linear.py
optim:
  optimizer: sgd
  lr: 0.001  # [dino] eval_linear.py, for 256 images
  weight_decay: 0.0  # [dino] eval_linear.py
  optimizer_kwargs:
    momentum: 0.9  # [dino] eval_linear.py
  schedule: cosine  # [dino] down to 0
guard: {}
monitor: {}
""",
)

SEGMENTATION = Recipe(
    name="segmentation",
    description="dense prediction by convolutional encoder-decoders (U-Net)",
    sources={
        "nnunet": "Isensee et al., nnU-Net, 2019, https://arxiv.org/abs/1904.08128, and its nnUNetTrainerV2",
        "amp": _MICIKEVICIUS,
    },
    batch=Batch(2, "nnunet", "volumes"),
    advice=(
        "With such small batches the norm is InstanceNorm, and momentum 0.99 averages over many of them [nnunet].",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 1000  # [nnunet] of 250 steps each
  precision: bf16-mixed  # [amp] mixed precision, as in [nnunet]
optim:
  optimizer: sgd
  lr: 0.01  # [nnunet] initial_lr
  weight_decay: 3.0e-5  # [nnunet] weight_decay
  optimizer_kwargs:
    momentum: 0.99  # [nnunet]
    nesterov: true  # [nnunet]
  schedule:
    class_path: lightning_optim.schedules.Polynomial
    init_args:
      power: 0.9  # [nnunet] poly_lr
  param_groups: []  # [nnunet] all weights are decayed
clip:
  max_norm: 12.0  # [nnunet] run_iteration
guard: {}
monitor: {}
""",
)

RECIPES = (VIT, RESNET, CONVNEXT, VISION_FINETUNE, LINEAR_PROBE, SEGMENTATION)
