"""What docs/site/hooks.py makes of a page."""

from __future__ import annotations

import importlib.util
import inspect
from types import ModuleType

import pytest
from doc_pages import ROOT

from descend import rules
from descend.second_order.mathematics.trust_region import DenseModel

pytest.importorskip("latex2mathml")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    inline = hooks.with_mathml(r'a <span class="arithmatex">\(x &lt; y\)</span> b')
    assert inline.startswith('a <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<mi>x</mi><mo>&lt;</mo><mi>y</mi>" in inline.replace("&#x0003C;", "&lt;")
    block = hooks.with_mathml('<div class="arithmatex">\\[\nx^2\n\\]</div>')
    assert 'display="block"' in block
    assert "arithmatex" not in inline + block


def test_functions_are_quoted_from_the_source(hooks: ModuleType) -> None:
    page = hooks.with_quotations("[source: adamw](../../src/descend/rules.py)", "learn/weight-decay.md")
    assert page == f'```python title="src/descend/rules.py"\n{inspect.getsource(rules.adamw).rstrip()}\n```'
    path = ROOT / "src" / "descend" / "second_order" / "mathematics" / "trust_region.py"
    assert hooks.definition(path, "DenseModel.step").startswith("def step(self, radius: float)")
    assert hooks.definition(path, "DenseModel.step") in inspect.cleandoc(inspect.getsource(DenseModel))
    with pytest.raises(LookupError, match=r"rules\.py defines no adamw2\."):
        hooks.definition(ROOT / "src" / "descend" / "rules.py", "adamw2")


def test_links_to_files_of_the_repository_lead_to_pages(hooks: ModuleType) -> None:
    link = "[rules](../src/descend/rules.py) [l](../src/descend/rules.py#L1) [b](groups.md) [net](https://a.b/c)"
    assert hooks.with_quotations(link, "sparse.md") == (
        "[rules](source/src/descend/rules.py.md) [l](source/src/descend/rules.py.md#__codelineno-0-1) [b](groups.md) "
        "[net](https://a.b/c)"
    )
    assert hooks.with_quotations("[r](../../README.md)", "how-to/switch.md") == "[r](../source/README.md.md)"
    assert hooks.source_page("LICENSE").endswith("````\n")
