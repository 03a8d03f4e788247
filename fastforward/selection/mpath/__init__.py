r"""Queries over the module tree: a path expression in, the modules it matches out.

>>> import torch
>>> from fastforward.selection import mpath
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
>>> mpath.search("**/[cls:torch.nn.Linear]", net).full_names()
['0']

Grammar::

    query    := ["/"] fragment ("/" fragment)* ["/"]
    fragment := NAME | "*" | "**" | "~" fragment | "&" ALIAS
              | "[" TAG ":" text "]"          # "\]" is a literal bracket
              | "{" query ("," query)* "}"    # alternatives

``*`` is exactly one level of the tree and ``**`` any number of levels, none included. The extensions are
``[cls:<class>]``, ``[re:<pattern>]`` and ``[quantizer:<tag>, <tag>]``; `mpath_query_extension` adds others.
"""

from fastforward.selection.mpath.collection import FilterResult, MPathCollection
from fastforward.selection.mpath.context import QueryContext, caller_context, local_context
from fastforward.selection.mpath.errors import MPathParseError
from fastforward.selection.mpath.extensions import (
    Class,
    QuantizerTags,
    RegexPath,
    mpath_query_extension,
    register_mpath_query_extension,
)
from fastforward.selection.mpath.parser import aliases, query
from fastforward.selection.mpath.search import search
from fastforward.selection.mpath.selectors import (
    AnyDepth,
    Disjoint,
    Fragment,
    Inverted,
    Joint,
    Path,
    Predicate,
    Selector,
    Wildcard,
)

root = AnyDepth()

__all__ = [
    "AnyDepth",
    "Class",
    "Disjoint",
    "FilterResult",
    "Fragment",
    "Inverted",
    "Joint",
    "MPathCollection",
    "MPathParseError",
    "Path",
    "Predicate",
    "QuantizerTags",
    "QueryContext",
    "RegexPath",
    "Selector",
    "Wildcard",
    "aliases",
    "caller_context",
    "local_context",
    "mpath_query_extension",
    "query",
    "register_mpath_query_extension",
    "root",
    "search",
]
