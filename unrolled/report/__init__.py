"""What each layer does: measured, predicted by theory, and a verdict; and what to do about it.

`LayerReport` is the report. Theories say what to expect of a layer, corrections what may be done, and a `Design` keeps
the log.
"""

from .columns import Column as Column
from .columns import Kind as Kind
from .columns import Row as Row
from .columns import share as share
from .corrections import AddMomentum as AddMomentum
from .corrections import CapLipschitz as CapLipschitz
from .corrections import Correction as Correction
from .corrections import Drop as Drop
from .corrections import Repeat as Repeat
from .corrections import Scale as Scale
from .corrections import Untie as Untie
from .design import Design as Design
from .design import Entry as Entry
from .layer_report import LayerReport as LayerReport
from .recording import Layer as Layer
from .recording import Run as Run
from .suggestions import Suggestion as Suggestion
from .theories import DiffusionTheory as DiffusionTheory
from .theories import FISTATheory as FISTATheory
from .theories import ISTATheory as ISTATheory
from .theories import LloydTheory as LloydTheory
from .theories import MeanFieldTheory as MeanFieldTheory
from .theory import Theory as Theory
from .verdicts import Rules as Rules
from .verdicts import Verdict as Verdict
