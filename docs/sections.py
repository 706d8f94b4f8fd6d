"""The docstrings say `Example:`, as those of torch.nn do; mkdocstrings sets as code what `Examples:` says."""

import re

import griffe


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
