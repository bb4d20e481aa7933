"""Recipes for text: pretraining, fine-tuning, adapters, encoder-decoders, recurrent networks."""

from __future__ import annotations

from lightning_optim.tuning.recipes.base import Batch, Recipe

_GPT3 = "Brown et al., Language Models are Few-Shot Learners, 2020, https://arxiv.org/abs/2005.14165"
_LLAMA = "Touvron et al., LLaMA, 2023, https://arxiv.org/abs/2302.13971"
_PYTHIA = "Biderman et al., Pythia, 2023, https://arxiv.org/abs/2304.01373, and its published configurations"
_KAPLAN = "Kaplan et al., Scaling Laws for Neural Language Models, 2020, https://arxiv.org/abs/2001.08361"
_BF16 = "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, https://arxiv.org/abs/1905.12322"

_SIZES = (
    "Other sizes [gpt3]: 350 M parameters 3.0e-4, 1.3 B 2.0e-4, 6.7 B 1.2e-4; LLaMA 7 B and 13 B 3.0e-4 [llama]. Below "
    "100 M, lr = 0.003239 - 0.0001395 ln(N) for N parameters without embeddings [kaplan, appendix D.6]."
)

GPT = Recipe(
    name="gpt",
    description="pretraining of decoder-only transformers (GPT, LLaMA) from scratch",
    sources={"gpt3": _GPT3, "llama": _LLAMA, "pythia": _PYTHIA, "kaplan": _KAPLAN, "bf16": _BF16},
    batch=Batch(500_000, "gpt3", "tokens"),
    advice=(
        _SIZES,
        "Short runs: a warmup of 1 % of some thousand steps is too short for many models; 5 % costs little.",
        "A run that may be extended: schedule: wsd, which decays at the end only.",
    ),
    settings_yaml="""\
trainer:
  max_steps: 600000  # [gpt3] 300 billion tokens in batches of 0.5 million; yours: tokens / tokens per step
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: adamw
  lr: 6.0e-4  # [gpt3] table 2.1, for 125 M parameters; by size, see above
  weight_decay: 0.1  # [gpt3] appendix B; [llama] section 2.3
  optimizer_kwargs:
    betas: [0.9, 0.95]  # [gpt3] appendix B; [llama] section 2.3
  schedule:
    class_path: lightning_optim.schedules.Cosine
    init_args:
      warmup: 1%  # [pythia] "warmup": 0.01
      final: 0.1  # [gpt3] appendix B: down to 10 % of the rate; [llama] the same
  param_groups: [no_decay]
clip:
  max_norm: 1.0  # [gpt3] appendix B; [llama] section 2.3
guard: {}
monitor: {}
""",
)

GPT_MUON = Recipe(
    name="gpt-muon",
    description="pretraining of decoder-only transformers with Muon for the matrices, AdamW for all else",
    sources={
        "moonlight": "Liu et al., Muon is Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982",
        "muon": "Jordan et al., Muon: An optimizer for hidden layers, 2024, https://kellerjordan.github.io/posts/muon/",
        "gpt3": _GPT3,
        "llama": _LLAMA,
        "pythia": _PYTHIA,
        "kaplan": _KAPLAN,
        "bf16": _BF16,
    },
    batch=Batch(500_000, "gpt3", "tokens"),
    advice=(
        "The steps of the matrices are scaled to the size of AdamW's, so rate and decay of AdamW serve [moonlight].",
        _SIZES,
        "The convention of [muon] in place of it: adjust_lr_fn: original, lr: 0.02 and adamw_lr of its own.",
    ),
    settings_yaml="""\
trainer:
  max_steps: 600000  # [gpt3] 300 billion tokens in batches of 0.5 million; yours: tokens / tokens per step
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: muon
  lr: 6.0e-4  # [gpt3] table 2.1, AdamW's rate for 125 M parameters, which [moonlight] keeps for Muon
  weight_decay: 0.1  # [moonlight] section 2.2, with AdamW's decay; [gpt3] appendix B
  optimizer_kwargs:
    adjust_lr_fn: match_rms_adamw  # [moonlight] equation 4: 0.2 sqrt(max(A, B))
    momentum: 0.95  # [muon]
    nesterov: true  # [muon]
    ns_steps: 5  # [muon]
    adamw_betas: [0.9, 0.95]  # [gpt3] appendix B; [llama] section 2.3
  schedule:
    class_path: lightning_optim.schedules.Cosine
    init_args:
      warmup: 1%  # [pythia] "warmup": 0.01
      final: 0.1  # [gpt3] appendix B: down to 10 % of the rate
  param_groups: [no_decay]
clip:
  max_norm: 1.0  # [gpt3] appendix B, for the part of AdamW; Muon's step does not depend on the norm
guard: {}
monitor: {}
""",
)

BERT_FINETUNE = Recipe(
    name="bert-finetune",
    description="fine-tuning of a pretrained transformer encoder (BERT, RoBERTa, ELECTRA), layer by layer",
    sources={
        "electra": "Clark et al., ELECTRA, 2020, https://arxiv.org/abs/2003.10555, and its configure_finetuning.py",
        "bert": "Devlin et al., BERT, 2018, https://arxiv.org/abs/1810.04805, and its optimization.py",
        "mosbach": "Mosbach et al., On the Stability of Fine-tuning BERT, 2020, https://arxiv.org/abs/2006.04884",
        "zhang": "Zhang et al., Revisiting Few-sample BERT Fine-tuning, 2020, https://arxiv.org/abs/2006.05987",
    },
    batch=Batch(32, "electra", "sequences"),
    advice=(
        "Large models: lr 5.0e-5 and layer_decay 0.9 [electra]. Without layer_decay: lr 2.0e-5 to 5.0e-5 [bert].",
        "Fewer than some thousand examples: more epochs, as 20, and lr 2.0e-5 [mosbach]; Adam's bias correction, which "
        "is always on here, matters most then [zhang].",
        "If no layers are recognised in the model, give the rule a pattern: {layer_decay: 0.8, pattern: "
        r"'tower\.(\d+)\.'}.",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 3  # [electra] 10 for the smallest tasks; [bert] 2 to 4
optim:
  optimizer: adamw
  lr: 1.0e-4  # [electra] small and base, of the head; lower layers learn at less
  weight_decay: 0.01  # [electra] weight_decay_rate; [bert] the same
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [bert] appendix A.2
    eps: 1.0e-6  # [electra] and [bert], optimization.py
  schedule: linear
  warmup: 10%  # [electra] warmup_proportion; [mosbach] section 6
  param_groups:
    - no_decay
    - layer_decay: 0.8  # [electra] small and base
clip:
  max_norm: 1.0  # [bert] and [electra], optimization.py
guard: {}
monitor: {}
""",
)

LORA = Recipe(
    name="lora",
    description="low-rank adapters (LoRA, QLoRA) in a frozen pretrained model",
    sources={
        "qlora": "Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314, and its qlora.py",
        "lora": "Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685",
        "loraplus": "Hayou et al., LoRA+, 2024, https://arxiv.org/abs/2402.12354",
        "bf16": _BF16,
    },
    batch=Batch(16, "qlora", "sequences"),
    advice=(
        "33 B parameters and more: lr 1.0e-4 [qlora]. [lora] has 2.0e-4 with a linear schedule for GPT-2 and GPT-3.",
        "LoRA+: the second factor learns 16 times as fast [loraplus]; add to param_groups {name: lora_b, pattern: "
        "'lora_B', lr_multiplier: 16}, with the pattern of your adapters.",
    ),
    settings_yaml="""\
trainer:
  max_steps: 10000  # [qlora] qlora.py; one to three epochs are usual
  precision: bf16-mixed  # [bf16] the range of 32 bits, so no loss scale
optim:
  optimizer: adamw
  lr: 2.0e-4  # [qlora] table 9, 7 B and 13 B; [lora] tables 11 and 12
  weight_decay: 0.0  # [qlora] qlora.py
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [qlora] appendix B
  schedule: constant  # [qlora] a bit better than cosine
  warmup: 3%  # [qlora] warmup_ratio
clip:
  max_norm: 0.3  # [qlora] tuned, for all sizes
guard: {}
monitor: {}
""",
)

T5 = Recipe(
    name="t5",
    description="pretraining of encoder-decoder transformers (T5), with little memory for the optimizer",
    sources={
        "t5": "Raffel et al., Exploring the Limits of Transfer Learning (T5), 2019, https://arxiv.org/abs/1910.10683",
        "adafactor": "Shazeer and Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235",
    },
    batch=Batch(128, "t5", "sequences of 512 tokens"),
    advice=(
        "Fine-tuning: schedule: constant and lr 0.001 [t5, section 3.1.2].",
        "The rate is relative: each tensor's step is lr times the root mean square of its weights [adafactor].",
    ),
    settings_yaml="""\
trainer:
  max_steps: 524288  # [t5] 2^19
optim:
  optimizer: adafactor
  lr: 0.01  # [t5] section 3.1.2: 1 / sqrt(k) with k = 10^4
  weight_decay: 0.0  # [adafactor] none
  optimizer_kwargs:
    beta2_decay: -0.8  # [adafactor] section 7.2
    d: 1.0  # [adafactor] section 6, the limit of an update's root mean square
  schedule:
    class_path: lightning_optim.schedules.InverseSqrt
    init_args:
      hold: 1.9%  # [t5] k = 10^4 of 2^19 steps
      timescale: 1.9%  # [t5] the same k
  param_groups: [no_decay]
guard: {}
monitor: {}
""",
)

LSTM = Recipe(
    name="lstm",
    description="recurrent networks on sequences (LSTM, GRU): language models, taggers, classifiers",
    sources={
        "merity": "Merity et al., An Analysis of Neural Language Modeling at Multiple Scales, 2018, "
        "https://arxiv.org/abs/1803.08240, and its code, awd-lstm-lm",
        "adam": "Kingma and Ba, Adam, 2014, https://arxiv.org/abs/1412.6980",
    },
    batch=Batch(128, "merity", "sequences of 200 characters"),
    advice=(
        "The decay is part of the gradient, as in torch's Adam [merity]; recurrent weights take dropout in its place.",
    ),
    settings_yaml="""\
trainer:
  max_epochs: 50  # [merity] enwik8
optim:
  optimizer: adam
  lr: 1.0e-3  # [merity] enwik8; [adam] its default
  weight_decay: 1.2e-6  # [merity] --wdecay
  optimizer_kwargs:
    betas: [0.9, 0.999]  # [adam]
  schedule:
    class_path: lightning_optim.schedules.MultiStepDecay
    init_args:
      milestones: [50%, 70%]  # [merity] epochs 25 and 35 of 50
      factor: 0.1  # [merity] divided by 10
  param_groups: []  # [merity] all weights are decayed
clip:
  max_norm: 0.25  # [merity] --clip
guard: {}
monitor: {}
""",
)

RECIPES = (GPT, GPT_MUON, BERT_FINETUNE, LORA, T5, LSTM)
