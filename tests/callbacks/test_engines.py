"""DeepSpeed's engine clips and steps by itself: it is told the limit, or refused with the reason."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy

import lightning_optim as lo
from lightning_optim.clipping import AGC
from tests.helpers import Net, batches, make_trainer


class DeepSpeedStrategy(SingleDeviceStrategy):
    """By its name and configuration; the engine itself needs a package and CUDA."""

    def __init__(self, **config):
        super().__init__(device="cpu")
        self.config = config


def _trainer(callbacks, **config):
    return make_trainer(callbacks, strategy=DeepSpeedStrategy(**config))


@pytest.mark.parametrize("config", [{}, {"gradient_clipping": 0.5}])
def test_the_engine_is_told_the_limit_and_nothing_is_clipped_twice(config):
    trainer = _trainer([lo.GradientClipping(0.5), lo.ConfigureOptimizers("sgd", lr=0.1)], **config)
    model = Net()
    trainer.fit(model, batches(3))
    assert trainer.strategy.config == {"gradient_clipping": 0.5}
    plain = Net()  # as if there were no callback, because this engine does nothing
    make_trainer([lo.ConfigureOptimizers("sgd", lr=0.1)]).fit(plain, batches(3))
    assert all((a == b).all() for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_another_limit_in_its_own_configuration_is_refused():
    with pytest.raises(MisconfigurationException, match=r"gradient_clipping=2.0 .*max_norm=0.5"):
        _trainer([lo.GradientClipping(0.5)], gradient_clipping=2.0).fit(Net(), batches(2))


@pytest.mark.parametrize("clipping", [lo.GradientClipping(method=AGC()), lo.GradientClipping(schedule="linear")])
def test_what_the_engine_cannot_do_is_refused(clipping):
    with pytest.raises(MisconfigurationException, match="by a constant global norm only"):
        _trainer([clipping]).fit(Net(), batches(2))


@pytest.mark.parametrize("callback", [lo.DivergenceGuard(), lo.OptimizerMonitor()])
def test_guard_and_monitor_are_refused_with_the_reason(callback):
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} cannot .*steps by itself"):
        _trainer([callback]).fit(Net(), batches(2))
