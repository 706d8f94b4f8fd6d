"""Scenes of several objects: how many, where and what, learned without labels."""

from .air import AIR as AIR
from .air import Found as Found
from .canvases import Canvases as Canvases
from .canvases import fraction_located as fraction_located
from .canvases import scenes as scenes
from .estimators import Enumerated as Enumerated
from .estimators import Estimator as Estimator
from .estimators import Sampled as Sampled
from .parts import GlimpseDecoder as GlimpseDecoder
from .parts import GlimpseEncoder as GlimpseEncoder
from .step import AIRStep as AIRStep
from .step import Scene as Scene
from .windows import crop as crop
from .windows import paint as paint
