"""Networks in files: weights as safetensors, and in their header a description from which the network is built again.

Nothing that a file says is imported or executed: classes are looked up among those of this library and those that the
caller passes.
"""

from .files import load as load
from .files import save as save
