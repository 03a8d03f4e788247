"""Names that a function imports in its body mean what the import statement says, where that is certain."""

import ast
import os.path
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant.local_imports import MISSING, followed, imported, imports_of
from tests.autoquant import text_helpers
from tests.autoquant.programs import load

MEANS: dict[str, Any] = {
    "import os; os.path.join": os.path.join,
    "import os.path; os.path.join": os.path.join,
    "import torch.nn.functional as F; F.linear": torch.nn.functional.linear,
    "from torch import nn; nn.functional.linear": torch.nn.functional.linear,
    "from torch.nn import functional as G; G.gelu": torch.nn.functional.gelu,
    "from .text_helpers import shifted; shifted": text_helpers.shifted,
    "from . import text_helpers as t; t.shifted": text_helpers.shifted,
    "import nobody_has_imported_this; nobody_has_imported_this": MISSING,
    "from torch import no_such_name; no_such_name": MISSING,
    "import torch; torch.no_such.name": MISSING,
}


@pytest.mark.parametrize("text", MEANS)
def test_what_it_means(text: str) -> None:
    statement, expression = ast.parse(text).body
    assert isinstance(statement, (ast.Import, ast.ImportFrom))
    assert isinstance(expression, ast.Expr)
    root: ast.AST = expression.value
    while isinstance(root, ast.Attribute):
        root = root.value
    assert isinstance(root, ast.Name)
    value = imported(imports_of(statement)[root.id], "tests.autoquant")
    assert followed(value, expression.value) is MEANS[text]


def sites(body: str) -> list[str]:
    module = load(f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x, y):\n{body}")
    model: Any = ff.quantize_model(module.Net())
    return [name for name, _ in model.named_quantizers(skip_stubs=False)]


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ("        from torch.nn.functional import gelu\n        return gelu(x)", True),
        ("        import torch.nn.functional as F\n        return F.gelu(x)", True),
        ("        from torch.nn.functional import gelu\n        return [gelu(v) for v in x][0]", True),
        ("        try:\n            from torch.nn.functional import gelu\n        except ImportError:\n"
         "            gelu = None\n        return gelu(x)", False),
        ("        from torch.nn.functional import gelu\n        gelu = y or gelu\n        return gelu(x)", False),
        ("        if y:\n            from torch.nn.functional import gelu\n        else:\n"
         "            from torch.nn.functional import relu as gelu\n        return gelu(x)", False),
    ],
)  # fmt: skip
def test_sites_exist_before_the_first_run_where_one_import_binds_the_name(body: str, known: bool) -> None:
    assert ("quantizer_gelu" in sites(body)) == known
