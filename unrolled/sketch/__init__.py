"""Sketches: what a network computed, in one vector of fixed size that can be compared, read, cut and learned from."""

from .blocks import Block as Block
from .blocks import SketchDictionary as SketchDictionary
from .comparing import similarity as similarity
from .decoders import LeastSquares as LeastSquares
from .decoders import MatchedFilter as MatchedFilter
from .decoders import SparseCoder as SparseCoder
from .decoders import best_decoder as best_decoder
from .learning import LearnedDictionary as LearnedDictionary
from .learning import learn_dictionary as learn_dictionary
from .learning import matched_atoms as matched_atoms
from .network import NetworkSketch as NetworkSketch
from .objects import Item as Item
from .objects import Sketcher as Sketcher
from .rotations import Rotation as Rotation
from .rotations import Transparent as Transparent
from .rotations import dct as dct
from .rotations import idct as idct
from .rotations import seed_of as seed_of
from .trace import TraceSketch as TraceSketch
from .trace import default_metrics as default_metrics
