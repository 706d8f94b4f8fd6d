"""The demo behind `python -m unrolled`: sparse coding of photographs by solvers and by networks made of them.

`data` holds the photographs, their patches and the dictionary; `networks` the networks and their training; `coding`
and `denoising` the two experiments; `page` the report in text and HTML.
"""

from .networks import load_network as load_network
