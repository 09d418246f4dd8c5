"""How much every stage of the miniature trains: FULL is what ships, QUICK runs every line in a few seconds each."""

from dataclasses import dataclass, field

from pipeline.training.miniature.adapter import AdapterPlan
from pipeline.training.miniature.data import DataPlan
from pipeline.training.miniature.detector import DetectorPlan
from pipeline.training.miniature.eva import EvaPlan
from pipeline.training.miniature.flux import FluxPlan
from pipeline.training.miniature.idformer import IdformerPlan
from pipeline.training.miniature.loop import LoopPlan
from pipeline.training.miniature.parser import ParserPlan
from pipeline.training.miniature.recogniser import RecogniserPlan
from pipeline.training.miniature.text import TextPlan
from pipeline.training.miniature.vae import VaePlan


@dataclass(frozen=True, slots=True)
class Plan:
    """Every stage's own plan."""

    data: DataPlan = field(default_factory=DataPlan)
    vae: VaePlan = field(default_factory=VaePlan)
    text: TextPlan = field(default_factory=TextPlan)
    detector: DetectorPlan = field(default_factory=DetectorPlan)
    recogniser: RecogniserPlan = field(default_factory=RecogniserPlan)
    parser: ParserPlan = field(default_factory=ParserPlan)
    eva: EvaPlan = field(default_factory=EvaPlan)
    flux: FluxPlan = field(default_factory=FluxPlan)
    idformer: IdformerPlan = field(default_factory=IdformerPlan)
    adapter: AdapterPlan = field(default_factory=AdapterPlan)


def _few(steps: int, batch: int, muon_lr: float = 0.0) -> LoopPlan:
    return LoopPlan(steps=steps, batch=batch, lr=1e-3, muon_lr=muon_lr, warm_up=1, save_every=1)


_ROUND = {"batch_size": 4, "id_batch_size": 2, "align_batch_size": 2, "steps": 2, "warmup": 1, "checkpoint_every": 1}

FULL = Plan()
QUICK = Plan(
    data=DataPlan(people=8, pictures=2),
    vae=VaePlan(_few(3, 2, 1e-3), _few(2, 2, 1e-3), measured=3),
    text=TextPlan(_few(2, 4), _few(2, 4), measured=10),
    detector=DetectorPlan(steps=4, more_steps=3, tried=4, hardest=2, people=12, examined=2),
    recogniser=RecogniserPlan(people=24, drawings=2, steps=3, batch=16, held_out=8),
    parser=ParserPlan(steps=3, batch=4, held_out=4),
    eva=EvaPlan(_few(2, 3, 1e-3), measured=6),
    flux=FluxPlan(_few(3, 4, 1e-3), _few(2, 4, 1e-3), compiled=False),
    idformer=IdformerPlan(_few(2, 4, 1e-3)),
    adapter=AdapterPlan(
        flow={"stage": 1, **_ROUND},
        identity={"stage": 2, **_ROUND, "id_form": "one_step"},
        alignment={"stage": 3, **_ROUND, "id_steps": 2, "id_gradient_steps": 1, "align_steps": 2},
        prompts=4,
    ),
)
