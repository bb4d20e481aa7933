"""Recipes for generative models, speech, tables, physics and reinforcement learning."""

from __future__ import annotations

from lightning_optim.tuning.recipes.base import Batch, Recipe

_ADAM = "Kingma and Ba, Adam, 2014, https://arxiv.org/abs/1412.6980"

GAN = Recipe(
    name="gan",
    description="generative adversarial networks: two optimizers in manual optimization",
    sources={
        "dcgan": "Radford et al., DCGAN, 2015, https://arxiv.org/abs/1511.06434",
        "ttur": "Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, https://arxiv.org/abs/1706.08500",
        "sagan": "Zhang et al., Self-Attention GAN, 2018, https://arxiv.org/abs/1805.08318",
    },
    batch=Batch(128, "dcgan", "images"),
    advice=(
        "`part` is the path of each network in your module: --optim.optimizers.generator.part gen.",
        "With spectral normalisation in both, two time scales [ttur]: generator 1.0e-4, discriminator 4.0e-4, betas "
        "[0.0, 0.9] [sagan, section 4].",
        "The weights of both are drawn with a standard deviation of 0.02 [dcgan]; that belongs in the module.",
    ),
    settings_yaml="""\
# trainer: {max_epochs: ...}  # yours, by the samples: no source gives a length for all data
optim:
  optimizers:
    - name: generator
      part: generator  # its path in your module
      optimizer: adam
      lr: 2.0e-4  # [dcgan] section 4
      betas: [0.5, 0.999]  # [dcgan] section 4: momentum 0.5
    - name: discriminator
      part: discriminator  # its path in your module
      optimizer: adam
      lr: 2.0e-4  # [dcgan] section 4
      betas: [0.5, 0.999]  # [dcgan] section 4: momentum 0.5
guard: {}
monitor: {}
""",
)

DIFFUSION = Recipe(
    name="diffusion",
    description="diffusion models: U-Nets and transformers that see a time step (DDPM, DiT)",
    sources={
        "ddpm": "Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239, appendix "
        "B, and its run_cifar.py",
        "adam": _ADAM,
        "dit": "Peebles and Xie, Scalable Diffusion Models with Transformers (DiT), 2022, "
        "https://arxiv.org/abs/2212.09748",
    },
    batch=Batch(128, "ddpm", "images"),
    advice=(
        "Samples come from the average of the weights, which validation and the final module have. In a run of N steps "
        "its decay is at most 1 - 5 / N, so that it spans a fifth of the run: lower it below 50,000 steps.",
        "256 x 256 images: lr 2.0e-5 [ddpm]. Transformers: lr 1.0e-4, 256 images, no warmup, no clipping [dit].",
    ),
    settings_yaml="""\
trainer:
  max_steps: 800000  # [ddpm] appendix B, CIFAR-10
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args:
        decay: 0.9999  # [ddpm] appendix B
optim:
  optimizer: adam
  lr: 2.0e-4  # [ddpm] appendix B
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [adam] left at their defaults in [ddpm]
  schedule: constant  # [ddpm] appendix B
  warmup: 0.625%  # [ddpm] run_cifar.py: 5,000 of 800,000 steps
clip:
  max_norm: 1.0  # [ddpm] run_cifar.py
guard: {}
monitor: {}
""",
)

SPEECH = Recipe(
    name="speech",
    description="speech recognition by convolution-augmented transformers (Conformer)",
    sources={
        "conformer": "Gulati et al., Conformer, 2020, https://arxiv.org/abs/2005.08100",
        "transformer": "Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762",
    },
    batch=None,
    advice=("Other widths d: lr 0.05 / sqrt(d) [conformer, section 3.2], so 3.1e-3 for 256 and 4.2e-3 for 144.",),
    settings_yaml="""\
trainer:
  max_steps: 100000  # [transformer] section 5.2
optim:
  optimizer: adam
  lr: 2.2e-3  # [conformer] section 3.2: 0.05 / sqrt(d), for d = 512
  weight_decay: 1.0e-6  # [conformer] section 3.2: L2 on all trainable weights
  optimizer_kwargs:
    betas: [0.9, 0.98]  # [conformer] section 3.2
    eps: 1.0e-9  # [conformer] section 3.2
  schedule: inverse_sqrt  # [transformer] section 5.3
  warmup: 4%  # [transformer] section 5.3: 4,000 of 100,000 steps; [conformer] 10,000 of a longer run
  param_groups: []  # [conformer] all weights are decayed
guard: {}
monitor: {}
""",
)

SPARSE_EMBEDDINGS = Recipe(
    name="sparse-embeddings",
    description="large embedding tables with a small network behind them: recommendation, click prediction (DLRM)",
    sources={
        "dlrm": "Naumov et al., Deep Learning Recommendation Model (DLRM), 2019, https://arxiv.org/abs/1906.00091",
        "adagrad": "Duchi et al., Adaptive Subgradient Methods, 2011, https://jmlr.org/papers/v12/duchi11a.html",
    },
    batch=None,
    advice=(
        "torch's Adagrad takes the sparse gradients of Embedding(sparse=True) as they are; the fused ones of this "
        "package refuse them. Rare rows keep a high rate, which is its point [adagrad]; its rate is torch's default.",
        "With dense gradients: optimizer: adagrad, which is fused.",
        "No clipping and no decay: both would touch every row of the tables at each step.",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 1  # [dlrm] section 5.1: a single epoch
optim:
  optimizer: torch.optim.Adagrad  # [dlrm] section 5.1; [adagrad]
guard: {}
monitor: {}
""",
)

PINN = Recipe(
    name="pinn",
    description="physics-informed networks: smooth perceptrons of coordinates, with derivatives in the loss",
    sources={
        "wang": "Wang et al., An Expert's Guide to Training Physics-informed Neural Networks, 2023, "
        "https://arxiv.org/abs/2308.08468, and its code, jaxpi",
    },
    batch=Batch(8192, "wang", "points"),
    advice=(
        "Weights drawn by Glorot's rule, one weight per loss term by the norm of its gradient [wang].",
        "Keep 32 bits: second derivatives of a network in 16 bits are noise.",
    ),
    settings_yaml="""\
trainer:
  max_steps: 300000  # [wang] jaxpi, Allen-Cahn
  precision: 32-true  # [wang] jaxpi, whose arrays have 32 bits
optim:
  optimizer: adam
  lr: 1.0e-3  # [wang] jaxpi
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [wang] jaxpi
    eps: 1.0e-8  # [wang] jaxpi
  schedule:
    class_path: lightning_optim.schedules.Exponential
    init_args:
      warmup: 1.67%  # [wang] jaxpi: 5,000 of 300,000 steps
      final: 0.002  # [wang] jaxpi: 0.9 per 5,000 steps, so 0.9^59 over the rest
guard: {}
monitor: {}
""",
)

MLP = Recipe(
    name="mlp",
    description="perceptrons on tables: regression and classification",
    sources={
        "gorishniy": "Gorishniy et al., Revisiting Deep Learning Models for Tabular Data, 2021, "
        "https://arxiv.org/abs/2106.11959",
        "adam": _ADAM,
    },
    batch=None,
    advice=(
        "Stop when the validation metric has not improved for 16 epochs [gorishniy]: lightning.pytorch."
        "callbacks.EarlyStopping, with the metric that your module logs.",
        "Search the rate between 1.0e-5 and 1.0e-2, the decay between 1.0e-6 and 1.0e-3 [gorishniy]. Inputs "
        "and targets are standardised.",
    ),
    settings_yaml="""\
# trainer: {max_epochs: ...}  # yours: early stopping ends the run
optim:
  optimizer: adamw
  lr: 1.0e-3  # [adam] its default; within the range of [gorishniy]
  weight_decay: 1.0e-5  # [gorishniy] the default of its FT-Transformer
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [adam]
  schedule: constant  # [gorishniy] no schedule
guard: {}
monitor: {}
""",
)

RL_POLICY_GRADIENT = Recipe(
    name="rl-policy-gradient",
    description="policy gradients with an actor and a critic (PPO, A2C)",
    sources={
        "ppo": "Schulman et al., Proximal Policy Optimization, 2017, https://arxiv.org/abs/1707.06347",
        "huang": "Huang et al., The 37 Implementation Details of Proximal Policy Optimization, 2022, "
        "https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/",
    },
    batch=Batch(64, "ppo", "steps of an environment"),
    advice=(
        "Atari: lr 2.5e-4, minibatches of 256 [ppo, table 5].",
        "Weights drawn orthogonally, the last layer of the policy with 0.01 [huang, detail 2].",
    ),
    settings_yaml="""\
trainer:
  max_steps: 156250  # [ppo] table 3: 1 million steps of the environment, each 10 times, by 64
optim:
  optimizer: adam
  lr: 3.0e-4  # [ppo] table 3, continuous control
  optimizer_kwargs:
    eps: 1.0e-5  # [huang] detail 3
  schedule: linear  # [huang] detail 4: down to 0
clip:
  max_norm: 0.5  # [huang] detail 10
guard: {}
monitor: {}
""",
)

RECIPES = (GAN, DIFFUSION, SPEECH, SPARSE_EMBEDDINGS, PINN, MLP, RL_POLICY_GRADIENT)
