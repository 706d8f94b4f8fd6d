"""When a sample has iterated enough: decided for each sample by itself, by a tolerance or by a rule that learns."""

from .count import Count as Count
from .halting import ExpectedLoss as ExpectedLoss
from .halting import Halting as Halting
from .halting import Outcomes as Outcomes
from .halting import outcomes as outcomes
from .heads import Reading as Reading
from .heads import Settling as Settling
from .rule import Running as Running
from .rule import Stopping as Stopping
from .rule import all_settled as all_settled
from .tolerance import Tolerance as Tolerance
