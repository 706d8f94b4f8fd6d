"""Figures: functions that take arrays and draw. Needs `unrolled[plot]`.

Those of one panel take `ax`, the axes to draw into, and return it; without one they make a new figure, `ax.figure`.
Those of several panels return the figure. Nothing here touches pyplot or its global state, so that figures can be made
anywhere, without a display.
"""

from ._style import COLOURS as COLOURS
from .curves import cost_curve as cost_curve
from .curves import gap_curve as gap_curve
from .curves import influence_functions as influence_functions
from .curves import layer_profile as layer_profile
from .curves import layer_values as layer_values
from .curves import scaling as scaling
from .pictures import before_after as before_after
from .pictures import centre_mosaic as centre_mosaic
from .pictures import dictionary_mosaic as dictionary_mosaic
from .pictures import filmstrip as filmstrip
from .pictures import kernel_mosaic as kernel_mosaic
from .pictures import support_evolution as support_evolution
from .reports import layer_quantity as layer_quantity
from .reports import layer_report as layer_report
from .trees import decision_boundary as decision_boundary
from .trees import tree_of_examples as tree_of_examples
from .trees import walk_over_examples as walk_over_examples
